"""Numbered SQL migrations, installed as `control.migrations`."""

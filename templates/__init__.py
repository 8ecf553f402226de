"""Pages of the dashboard, installed as `control.templates`."""

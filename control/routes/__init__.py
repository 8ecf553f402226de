"""The routes of the HTTP API, a module per subject; importing one registers its endpoints."""

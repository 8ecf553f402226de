"""The dashboard's pages, by area; each module registers its own with `control.pages.page`."""

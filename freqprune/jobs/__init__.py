"""A composed configuration comes in; a run folder goes out."""

"""A composed configuration comes in; a run folder goes out. Nothing in the package stands above the jobs."""

"""Methods, tasks, encoders and sources of other installed packages."""

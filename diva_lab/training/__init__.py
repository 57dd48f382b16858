"""Two stages, their settings, and the runs that they leave on disk."""

"""A recipe from start to end: checks, stage graph, Ray Train, resume."""

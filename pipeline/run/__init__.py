"""Runs of a recipe: checks, the stage graph, Ray Train, resuming, and publishing to MLflow."""

"""What Firstlight learns: torch and scipy only. Nothing here knows of Ray, MLflow, YAML or `pipeline`."""

"""What Firstlight learns: torch, torchvision, timm and scipy only. Nothing here knows of Ray, MLflow, YAML or `pipeline`."""

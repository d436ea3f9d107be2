"""Learning tasks: only torch, torchvision, timm and scipy. No module here uses Ray, MLflow, YAML or `pipeline`."""

"""Firstlight: unsupervised and semi-supervised visual pretraining on Ray, tracked in MLflow."""

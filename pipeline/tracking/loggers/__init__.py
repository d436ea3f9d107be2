"""Loggers besides MLflow: TensorBoard, Weights & Biases, and those of other packages."""

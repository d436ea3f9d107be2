"""Publishers: the numbers, figures and files of a finished stage, by its kind, for MLflow."""

"""What each kind of stage leaves in MLflow: numbers, pictures and files of a finished stage."""

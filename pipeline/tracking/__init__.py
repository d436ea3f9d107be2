"""MLflow: runs, models, lineage and retries. No other package imports MLflow."""

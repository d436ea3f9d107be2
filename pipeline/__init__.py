"""How Firstlight runs: Ray, MLflow and files. One file per stage, plus what the stages share."""

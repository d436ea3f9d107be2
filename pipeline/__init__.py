"""The pipeline around the learning: Ray, MLflow and files. Each package imports only the packages below it."""

from pathlib import Path

# The folder that holds `pipeline`, `tasks` and `conf`, in a checkout and in an installed wheel alike.
ROOT = Path(__file__).parent.parent

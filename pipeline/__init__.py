"""The pipeline around the learning: Ray, MLflow and files. Each package imports only the packages below it."""

import warnings
from pathlib import Path

# A notebook needs no widgets here; tqdm, which other libraries import, asks for them.
warnings.filterwarnings("ignore", message="IProgress not found")
# The folder that holds `pipeline`, `tasks` and `conf`, in a checkout and in an installed wheel alike.
ROOT = Path(__file__).parent.parent

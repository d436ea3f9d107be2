"""The digits of scikit-learn: no files, no network."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from firstlight.pipeline.data.sources.source import Record, Source, with_test

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )


@dataclass(frozen=True)
class Digits(Source):
    """1,797 digits of 8 x 8 pixels that come with scikit-learn, as PNG."""

    kind = "digits"

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        images, labels = _sklearn_digits()
        for place in places.tolist():
            file = io.BytesIO()
            Image.fromarray(np.rint(images[place] * (255 / 16)).astype(np.uint8)).save(file, "PNG")
            yield Record(str(place), file.getvalue(), int(labels[place]))


def _sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # importing it takes seconds, and only this source needs it

    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def open_digits(dataset: "Dataset") -> Digits:
    images, labels = _sklearn_digits()
    fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    rows = with_test({"train": np.arange(len(labels))}, [str(i).encode() for i in range(len(labels))], labels, dataset)
    return Digits(tuple("0123456789"), fingerprint, labels, rows)

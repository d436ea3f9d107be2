"""SVHN, format 2: 32 x 32 crops of house numbers in train_32x32.mat and test_32x32.mat (http://ufldl.stanford.edu/housenumbers).

extra_32x32.mat is not read: results are reported on the 73,257 training images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from firstlight.pipeline.data.sources.files import fingerprint
from firstlight.pipeline.data.sources.published import matlab
from firstlight.pipeline.data.sources.published.layout import check_labels, need
from firstlight.pipeline.data.sources.published.raw_pixels import PixelFile, Pixels
from firstlight.pipeline.data.sources.source import file_facts, local_root
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

NAMES = ("train_32x32.mat", "test_32x32.mat")
SHAPE = (32, 32, 3)


@dataclass(frozen=True)
class Svhn(Pixels):
    kind = "svhn"

    def _pixels(self, file: PixelFile, rows: list[int]) -> Iterator[np.ndarray | None]:
        images = _images(self.root / file.name, (self.root / file.name).stat().st_mtime_ns)
        if images.shape != (*SHAPE, file.count) or images.dtype != np.uint8:
            raise ValueError(f"it changed: its images are now {images.dtype} of shape {images.shape}")
        for row in rows:
            yield images[..., row]


@lru_cache(maxsize=1)
def _images(file: Path, changed: int) -> np.ndarray:
    """(32, 32, 3, n) uint8. One file a process: the format has to be unpacked as a whole, to 225 MB."""
    return matlab.variable(file, "X")


def open_svhn(dataset: "Dataset") -> Svhn:
    root = local_root(dataset)
    need(root, *NAMES)
    found = [_labels(root / name) for name in NAMES]
    labels = np.concatenate(found)
    rows = {"train": np.arange(len(found[0])), "test": np.arange(len(found[0]), len(labels))}
    files = tuple(PixelFile(name, len(part)) for name, part in zip(NAMES, found, strict=True))
    return Svhn(tuple("0123456789"), fingerprint(file_facts(root, name) for name in NAMES), labels, rows, root, files)


def _labels(file: Path) -> np.ndarray:
    """(n,) int64, 0 for the digit 0, which is stored as 10."""
    shape, kind = matlab.shapes(file).get("X", ((), "missing"))
    if shape[:-1] != SHAPE or kind != "uint8":
        raise UserError(f"{file}: the variable X is {kind} of shape {shape}; valid: uint8 of shape (32, 32, 3, n)")
    labels = matlab.integers(file, "y")
    if len(labels) != shape[-1]:
        raise UserError(f"{file}: has {len(labels)} labels in y for {shape[-1]} images in X")
    check_labels(file, labels, 1, 10)
    return labels % 10

"""SVHN, format 2: 32 x 32 crops of house numbers (http://ufldl.stanford.edu/housenumbers).

The files are train_32x32.mat and test_32x32.mat. extra_32x32.mat is not read: results are reported on the 73,257
training images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.sources.files import hash_facts
from firstlight.pipeline.data.sources.published import matlab
from firstlight.pipeline.data.sources.published.layout import check_labels, require_files
from firstlight.pipeline.data.sources.published.raw_pixels import PixelFile, PixelSource
from firstlight.pipeline.data.sources.source import SourceOptions, get_local_facts, open_local_root
from firstlight.pipeline.errors import UserError

SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
SVHN_SHAPE = (32, 32, 3)


@dataclass(frozen=True)
class Svhn(PixelSource):
    kind = "svhn"

    def _read_pixels(self, file: PixelFile, rows: list[int]) -> Iterator[np.ndarray | None]:
        images = _load_images(self.root / file.name, (self.root / file.name).stat().st_mtime_ns)
        if images.shape != (*SVHN_SHAPE, file.count) or images.dtype != np.uint8:
            raise ValueError(f"it changed: its images are now {images.dtype} of shape {images.shape}")
        for row in rows:
            yield images[..., row]


@lru_cache(maxsize=1)
def _load_images(file: Path, changed: int) -> np.ndarray:
    """Returns (32, 32, 3, n) uint8.

    The format has to be unpacked as a whole, to 225 MB, so that one file is kept for each process.
    """
    return matlab.read_variable(file, "X")


def open_svhn(dataset: SourceOptions) -> Svhn:
    """Lists the images.

    Raises:
        UserError: a file is missing or damaged, or has other shapes or labels.
    """
    root = open_local_root(dataset)
    require_files(root, *SVHN_FILES)
    found = [_read_digit_labels(root / name) for name in SVHN_FILES]
    labels = np.concatenate(found)
    rows = {"train": np.arange(len(found[0])), "test": np.arange(len(found[0]), len(labels))}
    files = tuple(PixelFile(name, len(part)) for name, part in zip(SVHN_FILES, found, strict=True))
    return Svhn(
        tuple("0123456789"), hash_facts(get_local_facts(root, name) for name in SVHN_FILES), labels, rows, root, files
    )


def _read_digit_labels(file: Path) -> np.ndarray:
    """Returns (n,) int64. The digit 0 is stored as 10.

    Raises:
        UserError: the shapes of images and labels do not agree, or a label is out of range.
    """
    shape, kind = matlab.read_shapes(file).get("X", ((), "missing"))
    if shape[:-1] != SVHN_SHAPE or kind != "uint8":
        raise UserError(f"{file}: the variable X is {kind} of shape {shape}; valid: uint8 of shape (32, 32, 3, n)")
    labels = matlab.read_integers(file, "y")
    if len(labels) != shape[-1]:
        raise UserError(f"{file}: has {len(labels)} labels in y for {shape[-1]} images in X")
    check_labels(file, labels, 1, 10)
    return labels % 10

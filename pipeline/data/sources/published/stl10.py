"""STL-10, binary files of 96 x 96 images: 5,000 with a label, 100,000 without, 8,000 to test on (https://cs.stanford.edu/~acoates/stl10)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from firstlight.pipeline.data.sources.files import fingerprint
from firstlight.pipeline.data.sources.published.layout import check_labels, class_names, home, lines, need
from firstlight.pipeline.data.sources.published.raw_pixels import PixelFile, Raw, rows_in
from firstlight.pipeline.data.sources.source import file_facts
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

FOLDER, CLASSES, FOLDS = "stl10_binary", "class_names.txt", "fold_indices.txt"
LABELLED = (("train_X.bin", "train_y.bin"), ("test_X.bin", "test_y.bin"))
UNLABELLED = "unlabeled_X.bin"
SHAPE, AXES = (3, 96, 96), (2, 1, 0)  # planes are stored column after column
PIXELS = 3 * 96 * 96


@dataclass(frozen=True)
class Stl10(Raw):
    kind = "stl10"


def open_stl10(dataset: "Dataset") -> Stl10:
    """The training split is train_X, labelled, and then unlabeled_X with label -1, in one listing. Subsets fold0, fold1, ...: as `folds`."""
    root = home(dataset, FOLDER)
    names = [name for pair in LABELLED for name in pair] + [UNLABELLED, CLASSES]
    need(root, *names)
    classes = class_names(root / CLASSES)
    (train, known), (test, truth) = (_labelled(root, images, labels, len(classes)) for images, labels in LABELLED)
    unlabelled = PixelFile(UNLABELLED, rows_in(root / UNLABELLED, PIXELS))
    labels = np.concatenate([known, np.full(unlabelled.count, -1, np.int64), truth])
    first = train.count + unlabelled.count
    rows = {"train": np.arange(first), "test": np.arange(first, len(labels))}
    known_folds = folds(root) if (root / FOLDS).exists() else []
    facts = fingerprint(file_facts(root, name) for name in [*names, *[FOLDS] * bool(known_folds)])
    subsets = {f"fold{k}": fold for k, fold in enumerate(known_folds)}
    return Stl10(classes, facts, labels, rows, root, (train, unlabelled, test), SHAPE, AXES, subsets=subsets)


def folds(root: Path) -> list[np.ndarray]:
    """The 10 sets of 1,000 labelled training images that results are averaged over, as places in the listing of `open_stl10`.

    Raises:
        UserError: naming the file and line of a number that is no place of a labelled training image.
    """
    folder = root / FOLDER if (root / FOLDER).is_dir() else root
    need(folder, FOLDS, LABELLED[0][1])
    count = (folder / LABELLED[0][1]).stat().st_size  # a byte an image; they come first in the listing
    return [_fold(f"{folder / FOLDS}: line {number}", line, count) for number, line in lines(folder / FOLDS)]


def _fold(where: str, line: str, count: int) -> np.ndarray:
    wrong = next((word for word in line.split() if not word.isdecimal() or int(word) >= count), None)
    if wrong is not None:
        raise UserError(f"{where}: {wrong!r} is no labelled training image; valid: 0 to {count - 1}")
    return np.array(line.split(), np.int64)


def _labelled(root: Path, images: str, labels: str, classes: int) -> tuple[PixelFile, np.ndarray]:
    """The file of images, and their labels (n,) int64 from 0, stored from 1."""
    stored = np.fromfile(root / labels, np.uint8).astype(np.int64)
    check_labels(root / labels, stored, 1, classes)
    if rows_in(root / images, PIXELS) > len(stored):
        raise UserError(
            f"{root / labels}: has {len(stored)} labels for the {rows_in(root / images, PIXELS)} images of {images}"
        )
    return PixelFile(images, len(stored)), stored - 1

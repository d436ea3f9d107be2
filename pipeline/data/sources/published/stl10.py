"""STL-10: binary files of 96 x 96 images (https://cs.stanford.edu/~acoates/stl10).

5,000 training images have labels, 100,000 have none, and 8,000 are test images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.sources.files import hash_facts
from firstlight.pipeline.data.sources.published.layout import (
    check_labels,
    find_unpacked_folder,
    read_class_lines,
    read_numbered_lines,
    require_files,
)
from firstlight.pipeline.data.sources.published.raw_pixels import PixelFile, RawPixelSource, count_rows
from firstlight.pipeline.data.sources.source import SourceOptions, get_local_facts
from firstlight.pipeline.errors import UserError

STL10_FOLDER, STL10_CLASSES, STL10_FOLDS = "stl10_binary", "class_names.txt", "fold_indices.txt"
STL10_LABELLED = (("train_X.bin", "train_y.bin"), ("test_X.bin", "test_y.bin"))
STL10_UNLABELLED = "unlabeled_X.bin"
# A plane is stored column after column
STL10_SHAPE, STL10_AXES = (3, 96, 96), (2, 1, 0)
STL10_PIXEL_BYTES = 3 * 96 * 96


@dataclass(frozen=True)
class Stl10(RawPixelSource):
    kind = "stl10"


def open_stl10(dataset: SourceOptions) -> Stl10:
    """Lists the images.

    The training split is train_X, which has labels, followed by unlabeled_X with label -1. The subsets fold0, fold1,
    ... are those of `read_folds`.

    Raises:
        UserError: a file is missing or empty, or a label or an index of a fold is out of range.
    """
    root = find_unpacked_folder(dataset, STL10_FOLDER)
    names = [name for pair in STL10_LABELLED for name in pair] + [STL10_UNLABELLED, STL10_CLASSES]
    require_files(root, *names)
    classes = read_class_lines(root / STL10_CLASSES)
    (train, known), (test, truth) = (
        _read_labelled(root, images, labels, len(classes)) for images, labels in STL10_LABELLED
    )
    unlabelled = PixelFile(STL10_UNLABELLED, count_rows(root / STL10_UNLABELLED, STL10_PIXEL_BYTES))
    labels = np.concatenate([known, np.full(unlabelled.count, -1, np.int64), truth])
    num_train = train.count + unlabelled.count
    rows = {"train": np.arange(num_train), "test": np.arange(num_train, len(labels))}
    known_folds = read_folds(root) if (root / STL10_FOLDS).exists() else []
    facts = hash_facts(get_local_facts(root, name) for name in [*names, *[STL10_FOLDS] * bool(known_folds)])
    subsets = {f"fold{k}": fold for k, fold in enumerate(known_folds)}
    return Stl10(
        classes, facts, labels, rows, root, (train, unlabelled, test), STL10_SHAPE, STL10_AXES, subsets=subsets
    )


def read_folds(root: Path) -> list[np.ndarray]:
    """Returns the 10 sets of 1,000 labelled training images that results are averaged over.

    They are indices in the listing of `open_stl10`.

    Raises:
        UserError: a number is no index of a labelled training image; the message names the file and the line.
    """
    folder = root / STL10_FOLDER if (root / STL10_FOLDER).is_dir() else root
    require_files(folder, STL10_FOLDS, STL10_LABELLED[0][1])
    # One byte for each image; these images come first in the listing
    count = (folder / STL10_LABELLED[0][1]).stat().st_size
    return [
        _parse_fold(f"{folder / STL10_FOLDS}: line {number}", line, count)
        for number, line in read_numbered_lines(folder / STL10_FOLDS)
    ]


def _parse_fold(where: str, line: str, count: int) -> np.ndarray:
    wrong = next((word for word in line.split() if not word.isdecimal() or int(word) >= count), None)
    if wrong is not None:
        raise UserError(f"{where}: {wrong!r} is no labelled training image; valid: 0 to {count - 1}")
    return np.array(line.split(), np.int64)


def _read_labelled(root: Path, images: str, labels: str, classes: int) -> tuple[PixelFile, np.ndarray]:
    """Returns the file of images, and their labels (n,) int64 from 0, which are stored from 1.

    Raises:
        UserError: a label is out of range, or there are fewer labels than images.
    """
    stored = np.fromfile(root / labels, np.uint8).astype(np.int64)
    check_labels(root / labels, stored, 1, classes)
    num_images = count_rows(root / images, STL10_PIXEL_BYTES)
    if num_images > len(stored):
        raise UserError(f"{root / labels}: has {len(stored)} labels for the {num_images} images of {images}")
    return PixelFile(images, len(stored)), stored - 1

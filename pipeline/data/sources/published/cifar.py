"""CIFAR-10 and CIFAR-100 in their binary version (https://www.cs.toronto.edu/~kriz/cifar.html).

A row is one or two labels of one byte and three planes of 32 x 32 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.sources.files import hash_facts
from firstlight.pipeline.data.sources.published.layout import (
    check_labels,
    find_unpacked_folder,
    read_class_lines,
    require_files,
)
from firstlight.pipeline.data.sources.published.raw_pixels import PixelFile, RawPixelSource, count_rows
from firstlight.pipeline.data.sources.source import SourceOptions, get_local_facts
from firstlight.pipeline.errors import UserError, suggest_valid

CIFAR_SHAPE, CIFAR_AXES = (3, 32, 32), (1, 2, 0)
CIFAR_PIXEL_BYTES = 3 * 32 * 32
CIFAR10_TRAIN_FILES = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
# dataset.label_column -> the byte of a row of CIFAR-100 that holds the label
CIFAR100_LABEL_BYTES = {"coarse": 0, "fine": 1}


@dataclass(frozen=True)
class Cifar10(RawPixelSource):
    kind = "cifar10"


@dataclass(frozen=True)
class Cifar100(RawPixelSource):
    kind = "cifar100"


def open_cifar10(dataset: SourceOptions) -> Cifar10:
    """Lists cifar-10-batches-bin: data_batch_1..5.bin, test_batch.bin and batches.meta.txt.

    Raises:
        UserError: a file is missing or empty, a label is out of range, or the folder holds the Python version.
    """
    root = find_unpacked_folder(dataset, "cifar-10-batches-bin")
    _refuse_pickles(root, ("cifar-10-batches-py", "data_batch_1"), "cifar-10-binary.tar.gz")
    names, meta = (*CIFAR10_TRAIN_FILES, "test_batch.bin"), "batches.meta.txt"
    require_files(root, *names, meta)
    classes = read_class_lines(root / meta)
    files, labels, rows = _index_pixel_files(root, names, (0, 1), len(classes))
    return Cifar10(classes, _hash_files(root, (*names, meta)), labels, rows, root, files, CIFAR_SHAPE, CIFAR_AXES)


def open_cifar100(dataset: SourceOptions) -> Cifar100:
    """Lists cifar-100-binary: train.bin, test.bin and the names of the classes.

    A row has a coarse label, a fine label and pixels; `dataset.label_column` chooses the label.

    Raises:
        UserError: the label is none of the two, or as `open_cifar10`.
    """
    root = find_unpacked_folder(dataset, "cifar-100-binary")
    _refuse_pickles(root, ("cifar-100-python", "train"), "cifar-100-binary.tar.gz")
    # `label` is the default of the config
    column = "fine" if dataset.label_column == "label" else dataset.label_column
    if column not in CIFAR100_LABEL_BYTES:
        raise UserError(
            f"dataset.label_column: {column!r} is no label of CIFAR-100; "
            f"{suggest_valid(str(column), CIFAR100_LABEL_BYTES)}"
        )
    names, meta = ("train.bin", "test.bin"), f"{column}_label_names.txt"
    require_files(root, *names, meta)
    classes = read_class_lines(root / meta)
    files, labels, rows = _index_pixel_files(root, names, (CIFAR100_LABEL_BYTES[column], 2), len(classes))
    return Cifar100(classes, _hash_files(root, (*names, meta)), labels, rows, root, files, CIFAR_SHAPE, CIFAR_AXES)


def _refuse_pickles(root: Path, marks: tuple[str, str], archive: str) -> None:
    """Checks that the folder does not hold the Python version of the set.

    Raises:
        UserError: it holds one of `marks` and no binary file; `archive` is the one to take instead.
    """
    if not list(root.glob("*.bin")) and any((root / mark).exists() for mark in marks):
        raise UserError(
            f"dataset.root: {str(root)!r} holds the Python version, whose files are pickles: "
            f"reading one can run any code, so none is read; "
            f"valid: the binary version, {archive} of https://www.cs.toronto.edu/~kriz/cifar.html"
        )


def _index_pixel_files(
    root: Path, names: Sequence[str], column: tuple[int, int], classes: int
) -> tuple[tuple[PixelFile, ...], np.ndarray, dict[str, np.ndarray]]:
    """Returns the files, the (n,) labels and the rows of each split; the last file is the test split.

    `column` is the byte of the label, and the number of bytes before the pixels of a row.
    """
    byte, skip = column
    files = tuple(PixelFile(name, count_rows(root / name, skip + CIFAR_PIXEL_BYTES), skip=skip) for name in names)
    labels = np.concatenate([_read_row_labels(root, file, byte, classes) for file in files])
    num_train = len(labels) - files[-1].count
    return files, labels, {"train": np.arange(num_train), "test": np.arange(num_train, len(labels))}


def _read_row_labels(root: Path, file: PixelFile, byte: int, classes: int) -> np.ndarray:
    """Returns (file.count,) int64; -1 if the file ends before the row does."""
    stored = np.memmap(root / file.name, np.uint8, "r")
    row = file.skip + CIFAR_PIXEL_BYTES
    whole = len(stored) // row
    labels = np.full(file.count, -1, np.int64)
    labels[:whole] = stored[: whole * row].reshape(whole, row)[:, byte]
    check_labels(root / file.name, labels[:whole], 0, classes - 1)
    return labels


def _hash_files(root: Path, names: Sequence[str]) -> str:
    return hash_facts(get_local_facts(root, name) for name in names)

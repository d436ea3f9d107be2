"""CIFAR-10 and CIFAR-100, the binary version: rows of one or two labels and three planes of 32 x 32 (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from firstlight.pipeline.data.sources.files import fingerprint
from firstlight.pipeline.data.sources.published.layout import check_labels, class_names, home, need
from firstlight.pipeline.data.sources.published.raw_pixels import PixelFile, Raw, rows_in
from firstlight.pipeline.data.sources.source import file_facts
from firstlight.pipeline.errors import UserError, suggest_valid

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

SHAPE, AXES = (3, 32, 32), (1, 2, 0)
PIXELS = 3 * 32 * 32
TRAIN10 = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
COLUMNS = {"coarse": 0, "fine": 1}  # dataset.label_column -> byte of a row of CIFAR-100


@dataclass(frozen=True)
class Cifar10(Raw):
    kind = "cifar10"


@dataclass(frozen=True)
class Cifar100(Raw):
    kind = "cifar100"


def open_cifar10(dataset: "Dataset") -> Cifar10:
    """cifar-10-batches-bin: data_batch_1..5.bin and test_batch.bin, rows of label and pixels, and batches.meta.txt."""
    root = home(dataset, "cifar-10-batches-bin")
    _no_pickle(root, ("cifar-10-batches-py", "data_batch_1"), "cifar-10-binary.tar.gz")
    names, meta = (*TRAIN10, "test_batch.bin"), "batches.meta.txt"
    need(root, *names, meta)
    classes = class_names(root / meta)
    files, labels, rows = _listed(root, names, (0, 1), len(classes))
    return Cifar10(classes, _facts(root, (*names, meta)), labels, rows, root, files, SHAPE, AXES)


def open_cifar100(dataset: "Dataset") -> Cifar100:
    """cifar-100-binary: train.bin and test.bin, rows of coarse label, fine label and pixels, and the names. Which: `dataset.label_column`."""
    root = home(dataset, "cifar-100-binary")
    _no_pickle(root, ("cifar-100-python", "train"), "cifar-100-binary.tar.gz")
    column = "fine" if dataset.label_column == "label" else dataset.label_column  # `label` is the default of the config
    if column not in COLUMNS:
        raise UserError(
            f"dataset.label_column: {column!r} is no label of CIFAR-100; {suggest_valid(str(column), COLUMNS)}"
        )
    names, meta = ("train.bin", "test.bin"), f"{column}_label_names.txt"
    need(root, *names, meta)
    classes = class_names(root / meta)
    files, labels, rows = _listed(root, names, (COLUMNS[column], 2), len(classes))
    return Cifar100(classes, _facts(root, (*names, meta)), labels, rows, root, files, SHAPE, AXES)


def _no_pickle(root: Path, marks: tuple[str, str], archive: str) -> None:
    if not list(root.glob("*.bin")) and any((root / mark).exists() for mark in marks):
        raise UserError(
            f"dataset.root: {str(root)!r} holds the Python version, whose files are pickles: reading one can run any code, so none is read; "
            f"take the binary version, {archive} of https://www.cs.toronto.edu/~kriz/cifar.html"
        )


def _listed(
    root: Path, names: Sequence[str], column: tuple[int, int], classes: int
) -> tuple[tuple[PixelFile, ...], np.ndarray, dict[str, np.ndarray]]:
    """Files, labels and rows of each split, the last file being the test split; `column` is the label's byte, of how many before the pixels."""
    byte, skip = column
    files = tuple(PixelFile(name, rows_in(root / name, skip + PIXELS), skip=skip) for name in names)
    labels = np.concatenate([_labels(root, file, byte, classes) for file in files])
    test = len(labels) - files[-1].count
    return files, labels, {"train": np.arange(test), "test": np.arange(test, len(labels))}


def _labels(root: Path, file: PixelFile, byte: int, classes: int) -> np.ndarray:
    """(file.count,) int64; -1 where the file ends before the row does."""
    stored = np.memmap(root / file.name, np.uint8, "r")
    row = file.skip + PIXELS
    whole = len(stored) // row
    labels = np.full(file.count, -1, np.int64)
    labels[:whole] = stored[: whole * row].reshape(whole, row)[:, byte]
    check_labels(root / file.name, labels[:whole], 0, classes - 1)
    return labels


def _facts(root: Path, names: Sequence[str]) -> str:
    return fingerprint(file_facts(root, name) for name in names)

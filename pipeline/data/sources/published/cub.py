"""Caltech-UCSD Birds 200 (2011): images.txt, image_class_labels.txt, train_test_split.txt and classes.txt beside images/."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firstlight.pipeline.data.sources.files import text
from firstlight.pipeline.data.sources.folder import Folder
from firstlight.pipeline.data.sources.published.image_lists import Entry, Listing, listed_source
from firstlight.pipeline.data.sources.published.layout import home, inside, lines, need
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

CLASSES, IMAGES, LABELS, SPLIT = "classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"


@dataclass(frozen=True)
class Cub200(Folder):
    kind = "cub200"


def open_cub200(dataset: "Dataset") -> Cub200:
    root = home(dataset, "CUB_200_2011")
    need(root, CLASSES, IMAGES, LABELS, SPLIT)
    classes = {key: (k, name) for k, (key, (_, name)) in enumerate(_table(root / CLASSES).items())}
    labels, splits = _table(root / LABELS), _table(root / SPLIT)
    entries: dict[str, list[Entry]] = {"1": [], "0": []}  # is it a training image?
    for key, (number, path) in _table(root / IMAGES).items():
        label = _one_of(root / LABELS, labels, key, sorted(classes, key=int))
        split = _one_of(root / SPLIT, splits, key, ["0", "1"])
        entries[split].append(Entry("images/" + inside(path, f"{root / IMAGES}: line {number}"), classes[label][0]))
    names = tuple(text(os.fsencode(name)) for _, name in classes.values())
    return listed_source(
        Cub200, Listing(root, (IMAGES, LABELS, SPLIT, CLASSES), names, entries["1"], entries["0"]), dataset
    )


def _table(file: Path) -> dict[str, tuple[int, str]]:
    """Number of an image or a class -> (line, the rest of the line)."""
    table: dict[str, tuple[int, str]] = {}
    for number, line in lines(file):
        key, _, value = line.partition(" ")
        if not key.isdecimal() or not value or key in table:
            raise UserError(f"{file}: line {number}: {line!r} is not a new number and a value")
        table[key] = (number, value.strip())
    return table


def _one_of(file: Path, table: dict[str, tuple[int, str]], key: str, valid: list[str]) -> str:
    if key not in table:
        raise UserError(f"{file}: has no line for image {key} of {IMAGES}")
    number, value = table[key]
    if value not in valid:
        raise UserError(f"{file}: line {number}: {value!r} is out of range; valid: {valid[0]} to {valid[-1]}")
    return value

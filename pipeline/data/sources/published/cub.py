"""Caltech-UCSD Birds 200 (2011): images/, images.txt, image_class_labels.txt, train_test_split.txt and classes.txt."""

import os
from dataclasses import dataclass
from pathlib import Path

from firstlight.pipeline.data.sources.files import decode_path
from firstlight.pipeline.data.sources.folder import FolderSource
from firstlight.pipeline.data.sources.published.image_lists import ImageListing, ListedImage, make_listed_source
from firstlight.pipeline.data.sources.published.layout import (
    check_relative_path,
    find_unpacked_folder,
    read_numbered_lines,
    require_files,
)
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError

CUB_CLASSES, CUB_IMAGES, CUB_LABELS, CUB_SPLIT = (
    "classes.txt",
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
)


@dataclass(frozen=True)
class Cub200(FolderSource):
    kind = "cub200"


def open_cub200(dataset: SourceOptions) -> Cub200:
    """Joins the tables by the number of the image.

    Raises:
        UserError: a file is missing, or a line is no number and value, or its value is out of range.
    """
    root = find_unpacked_folder(dataset, "CUB_200_2011")
    require_files(root, CUB_CLASSES, CUB_IMAGES, CUB_LABELS, CUB_SPLIT)
    classes = {key: (k, name) for k, (key, (_, name)) in enumerate(_read_numbered_table(root / CUB_CLASSES).items())}
    labels, splits = _read_numbered_table(root / CUB_LABELS), _read_numbered_table(root / CUB_SPLIT)
    # Keys as in train_test_split.txt: "1" is a training image
    entries: dict[str, list[ListedImage]] = {"1": [], "0": []}
    for key, (number, path) in _read_numbered_table(root / CUB_IMAGES).items():
        label = _look_up_value(root / CUB_LABELS, labels, key, sorted(classes, key=int))
        split = _look_up_value(root / CUB_SPLIT, splits, key, ["0", "1"])
        entries[split].append(
            ListedImage("images/" + check_relative_path(path, f"{root / CUB_IMAGES}: line {number}"), classes[label][0])
        )
    names = tuple(decode_path(os.fsencode(name)) for _, name in classes.values())
    return make_listed_source(
        Cub200,
        ImageListing(root, (CUB_IMAGES, CUB_LABELS, CUB_SPLIT, CUB_CLASSES), names, entries["1"], entries["0"]),
        dataset,
    )


def _read_numbered_table(file: Path) -> dict[str, tuple[int, str]]:
    """Returns the number of an image or a class -> (line, the remaining text of the line).

    Raises:
        UserError: a line is no number and value, or repeats a number.
    """
    table: dict[str, tuple[int, str]] = {}
    for number, line in read_numbered_lines(file):
        key, _, value = line.partition(" ")
        if not key.isdecimal() or not value or key in table:
            raise UserError(f"{file}: line {number}: {line!r} is not a new number and a value")
        table[key] = (number, value.strip())
    return table


def _look_up_value(file: Path, table: dict[str, tuple[int, str]], key: str, valid: list[str]) -> str:
    """Returns the value of an image in `table`.

    Raises:
        UserError: it has no line, or its value is none of `valid`.
    """
    if key not in table:
        raise UserError(f"{file}: has no line for image {key} of {CUB_IMAGES}")
    number, value = table[key]
    if value not in valid:
        raise UserError(f"{file}: line {number}: {value!r} is out of range; valid: {valid[0]} to {valid[-1]}")
    return value

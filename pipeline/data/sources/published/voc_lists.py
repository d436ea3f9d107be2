"""The lists of PASCAL VOC: the images of each split, and the images in which a class occurs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.sources.published.image_lists import ListedImage
from firstlight.pipeline.data.sources.published.layout import (
    check_relative_path,
    read_numbered_lines,
    require_files,
)
from firstlight.pipeline.data.sources.published.voc_names import VOC_IMAGES, ImageNames
from firstlight.pipeline.errors import UserError

VOC_MAIN, VOC_SEGMENTATION = "ImageSets/Main", "ImageSets/Segmentation"
VOC_SPLITS = ("train", "val", "trainval", "test")
# Value in the list of a class -> 1 (occurs), 0 (does not), -1 (occurs only in objects that are difficult)
OCCURRENCE_VALUES = {"1": 1, "-1": 0, "0": -1}
# No list of the class names the image
UNLISTED = -2


def read_split_lists(root: Path, folder: str, names: ImageNames) -> dict[str, dict[str, None]]:
    """Returns split -> the names of its images, for the lists that exist.

    Raises:
        UserError: there is no list for training, none of the names of a list exists, or a line that names no image is
            no relative path.
    """
    splits = [split for split in VOC_SPLITS if (root / folder / f"{split}.txt").exists()]
    if not {"train", "trainval"} & set(splits):
        require_files(root, f"{folder}/trainval.txt")
    return {split: _read_image_names(root / folder / f"{split}.txt", names) for split in splits}


def _read_image_names(file: Path, names: ImageNames) -> dict[str, None]:
    """Returns the name of each line, in order, each once. If there is no such image, it is the first word."""
    found: dict[str, None] = {}
    lines = read_numbered_lines(file)
    for number, line in lines:
        name = names.find_name(line, file)
        found[name or check_relative_path(line.split()[0], f"{file}: line {number}")] = None
    names.check_found(file, len(lines))
    return found


def list_split_images(
    names: ImageNames, lists: Mapping[str, dict[str, None]]
) -> tuple[dict[str, ListedImage], dict[str, ListedImage]]:
    """Returns name -> image of the training and of the test split. An image that both lists name is in both."""
    train = {**lists.get("trainval", {}), **lists.get("train", {}), **lists.get("val", {})}
    test = lists.get("test", lists.get("val", {}))
    if "test" not in lists:
        train = {name: None for name in train if name not in test}

    def find_images(listed: Mapping[str, None]) -> dict[str, ListedImage]:
        return {name: ListedImage(names.paths.get(name, f"{VOC_IMAGES}/{name}.jpg"), -1) for name in listed}

    return find_images(train), find_images(test)


def make_subsets(lists: Mapping[str, Mapping[str, None]], indices: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Returns the two parts of trainval; only `train` if `val` is the test split."""
    parts = ("train", "val") if "test" in lists or "val" not in lists else ("train",)
    return {name: np.array([indices[image] for image in lists[name]], np.int64) for name in parts if lists.get(name)}


def read_occurrence(
    root: Path, classes: Sequence[str], indices: Mapping[str, int], splits: Sequence[str], names: ImageNames
) -> tuple[np.ndarray, list[str]]:
    """Reads the lists <class>_<split>.txt.

    Args:
        indices: name of an image -> its index in the listing of n images.
        names: finds the name of an image that a line names.

    Returns:
        (n, classes) int8, `UNLISTED` if no list names the image; and the names of the lists.

    Raises:
        UserError: a line is no image and value, or two lists of a class contradict each other.
    """
    occurs = np.full((len(indices), len(classes)), UNLISTED, np.int8)
    existing = set(os.listdir(root / VOC_MAIN)) if splits and classes else set()
    lists = [(k, f"{name}_{split}.txt") for k, name in enumerate(classes) for split in splits]
    lists = [(k, name) for k, name in lists if name in existing]
    for k, name in lists:
        file = root / VOC_MAIN / name
        for number, line in read_numbered_lines(file):
            image, value = ["", *line.rsplit(maxsplit=1)][-2:]
            found = names.find_name(image) if image else None
            if not image or value not in OCCURRENCE_VALUES or not names.is_one_name(image):
                valid = ", ".join(OCCURRENCE_VALUES)
                raise UserError(f"{file}: line {number}: {line[:80]!r} is not an image and one of {valid}")
            index = indices.get(found or image)
            if index is None:
                continue
            if occurs[index, k] not in (UNLISTED, OCCURRENCE_VALUES[value]):
                raise UserError(f"{file}: line {number}: {line[:80]!r} is not what another list of {classes[k]!r} says")
            occurs[index, k] = OCCURRENCE_VALUES[value]
    return occurs, [f"{VOC_MAIN}/{name}" for _, name in lists]

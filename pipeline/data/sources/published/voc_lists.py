"""The lists of PASCAL VOC: the images of each split, and the images in which a class occurs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.sources.published.image_lists import ListedImage, list_image_files
from firstlight.pipeline.data.sources.published.layout import (
    check_relative_path,
    read_numbered_lines,
    require_files,
)
from firstlight.pipeline.errors import UserError

VOC_IMAGES = "JPEGImages"
VOC_MAIN, VOC_SEGMENTATION = "ImageSets/Main", "ImageSets/Segmentation"
VOC_SPLITS = ("train", "val", "trainval", "test")
# Value in the list of a class -> 1 (occurs), 0 (does not), -1 (occurs only in objects that are difficult)
OCCURRENCE_VALUES = {"1": 1, "-1": 0, "0": -1}
# No list of the class names the image
UNLISTED = -2


def read_split_lists(root: Path, folder: str) -> dict[str, dict[str, None]]:
    """Returns split -> the names of its images, for the lists that exist.

    Raises:
        UserError: there is no list for training, or a line is no relative path.
    """
    splits = [split for split in VOC_SPLITS if (root / folder / f"{split}.txt").exists()]
    if not {"train", "trainval"} & set(splits):
        require_files(root, f"{folder}/trainval.txt")
    return {split: _read_image_names(root / folder / f"{split}.txt") for split in splits}


def _read_image_names(file: Path) -> dict[str, None]:
    """Returns the first word of each line, in order, each once. Lists of one class state its occurrence after it."""
    return {
        check_relative_path(line.split()[0], f"{file}: line {number}"): None
        for number, line in read_numbered_lines(file)
    }


def list_split_images(
    root: Path, lists: Mapping[str, dict[str, None]]
) -> tuple[dict[str, ListedImage], dict[str, ListedImage]]:
    """Returns name -> image of the training and of the test split. An image that both lists name is in both."""
    train = {**lists.get("trainval", {}), **lists.get("train", {}), **lists.get("val", {})}
    test = lists.get("test", lists.get("val", {}))
    if "test" not in lists:
        train = {name: None for name in train if name not in test}
    files = {name.rpartition(".")[0]: name for name in list_image_files(root, VOC_IMAGES)}

    def find_images(names: Mapping[str, None]) -> dict[str, ListedImage]:
        return {name: ListedImage(files.get(f"{VOC_IMAGES}/{name}", f"{VOC_IMAGES}/{name}.jpg"), -1) for name in names}

    return find_images(train), find_images(test)


def make_subsets(lists: Mapping[str, Mapping[str, None]], indices: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Returns the two parts of trainval; only `train` if `val` is the test split."""
    parts = ("train", "val") if "test" in lists or "val" not in lists else ("train",)
    return {name: np.array([indices[image] for image in lists[name]], np.int64) for name in parts if lists.get(name)}


def read_occurrence(
    root: Path, classes: Sequence[str], indices: Mapping[str, int], splits: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Reads the lists <class>_<split>.txt.

    Args:
        indices: name of an image -> its index in the listing of n images.

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
            image, *value = line.split()
            if len(value) != 1 or value[0] not in OCCURRENCE_VALUES:
                valid = ", ".join(OCCURRENCE_VALUES)
                raise UserError(f"{file}: line {number}: {line[:80]!r} is not an image and one of {valid}")
            index = indices.get(image)
            if index is None:
                continue
            if occurs[index, k] not in (UNLISTED, OCCURRENCE_VALUES[value[0]]):
                raise UserError(f"{file}: line {number}: {line[:80]!r} is not what another list of {classes[k]!r} says")
            occurs[index, k] = OCCURRENCE_VALUES[value[0]]
    return occurs, [f"{VOC_MAIN}/{name}" for _, name in lists]

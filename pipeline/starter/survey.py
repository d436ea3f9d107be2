"""Facts of a folder or a list of images that decide the settings of a first recipe."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.conf_files import CONF_FOLDER
from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.prepare.shared_format import ProbedImage, SharedFormat, find_shared_format, probe_images
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.data.sources.list_columns import LIST_DELIMITERS
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.terminal import format_count

# Training images whose headers are read.
NUM_SAMPLED_IMAGES = 200


@dataclass(frozen=True)
class ImageSurvey:
    """Facts of the images, known from their listing and some of their headers."""

    # The keys of a recipe's section `dataset` besides the size: {"name", "root"} or {"name", "list"}, and the channels.
    dataset: dict[str, Any]
    num_train: int
    num_test: int
    classes: tuple[str, ...]
    # The smallest number of training images of a class; 0 without labels.
    class_images: int
    # The median of the sampled images' shorter sides, in pixels.
    side: int
    is_grey: bool
    # The format that images have where they are not read as colours.
    shared: SharedFormat | None = None


def survey_images(location: Path) -> ImageSurvey:
    """Lists the images of a folder, or of a file that lists them, and reads some of their headers.

    Raises:
        UserError: there are none, they cannot be read, or what they are is not certain; as `open_source`.
    """
    dataset = name_dataset(location)
    source = open_source(read_dataset_options(dataset))
    train = source.rows["train"] if "train" in source.rows else np.empty(0, np.int64)
    if not len(train):
        raise UserError(f"{location}: has no training images")
    known = source.labels[train]
    counts = np.bincount(known[known >= 0], minlength=len(source.classes)) if source.classes else np.zeros(1, int)
    probed = list(probe_images(source, select_sampled(source, NUM_SAMPLED_IMAGES)))
    shared = find_shared_format(probed)
    side, is_grey = _describe_headers(probed, location) if shared is None else (shared.side, False)
    return ImageSurvey(
        dataset if shared is None else {**dataset, **shared.pixels.dump()},
        len(train),
        len(source.rows.get("test", ())),
        source.classes,
        int(counts.min()),
        side,
        is_grey,
        shared,
    )


def select_sampled(source: Source, count: int) -> list[int]:
    """Returns the positions of `count` training images, evenly spaced in the order of the source."""
    positions: list[int] = select_evenly_spaced(np.arange(source.splits.get("train", 0)), count).tolist()
    return positions


def name_dataset(location: Path) -> dict[str, Any]:
    """Returns what a recipe's section `dataset` says of images in a folder, or in a file that lists them.

    Raises:
        UserError: there is no such folder or file, or it is no list.
    """
    if not location.exists():
        raise UserError(f"{location}: does not exist; valid: a folder of images, or a file that lists them")
    full = str(location.resolve())
    if location.is_dir():
        return {"name": "folder", "root": full}
    if location.suffix.lower() not in LIST_DELIMITERS:
        raise UserError(f"{location}: is no list of images; valid: a folder, or a file of {', '.join(LIST_DELIMITERS)}")
    return {"name": "list", "list": full}


def read_dataset_options(dataset: Mapping[str, Any]) -> DatasetOptions:
    """Returns a section `dataset` as a recipe would have it: with the keys that its file in `conf` gives."""
    base = yaml_reader.read_yaml(CONF_FOLDER / "dataset" / f"{dataset['name']}.yaml")
    return DatasetOptions.model_validate_json(json.dumps({**base, **dataset}))


def check_readable(probed: list[ProbedImage], location: Path) -> None:
    """Checks that one of some images can be read.

    Raises:
        UserError: none can; names the first of them, and why.
    """
    if probed and all(image.header is None and image.own_format is None for image in probed):
        tried, first = format_count(len(probed), "image"), probed[0]
        were = "was" if len(probed) == 1 else "were"
        raise UserError(
            f"{location}: none of {tried} that {were} tried can be read; the first, {first.path}: {first.reason}"
        )


def _describe_headers(probed: list[ProbedImage], location: Path) -> tuple[int, bool]:
    """Returns the median shorter side of some images, and True if all of them are grey."""
    check_readable(probed, location)
    headers = [image.header for image in probed if image.header is not None]
    side = int(np.median([min(header.frame.upright) for header in headers]))
    return side, all(header.mode == "1" or header.mode.startswith(("L", "I")) for header in headers)

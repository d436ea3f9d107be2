"""Sources whose images are files named by lists, as most published sets have them. They are read like a folder."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.conventions.folder_scan import IMAGE_ENDINGS, get_entry_facts
from firstlight.pipeline.data.sources.conventions.reading import count_things
from firstlight.pipeline.data.sources.files import FileFacts, decode_path, hash_facts, is_below
from firstlight.pipeline.data.sources.folder import FolderSource
from firstlight.pipeline.data.sources.source import SourceOptions, get_local_facts
from firstlight.pipeline.data.sources.source_splits import add_test_split
from firstlight.pipeline.errors import UserError

FolderSourceT = TypeVar("FolderSourceT", bound=FolderSource)


class ListedImage(NamedTuple):
    """An image that a list names. If there is no such file, its record says so when it is read."""

    # Relative to the root
    path: str
    # -1 = unknown
    label: int


class ImageListing(NamedTuple):
    """The content of the lists of a set."""

    root: Path
    # The names of the lists
    lists: tuple[str, ...]
    classes: tuple[str, ...]
    train: Sequence[ListedImage]
    # () = becomes a part of the training split, see `add_test_split`
    test: Sequence[ListedImage]


def make_listed_source(
    kind: type[FolderSourceT], listing: ImageListing, dataset: SourceOptions, **fields: Any
) -> FolderSourceT:
    """Returns a source of class `kind`, with the training images first, in the order of the lists.

    `fields` are those that the class has in addition to `FolderSource`.

    Raises:
        UserError: there is no training image, an image is listed twice, or a folder is a link that leaves the root.
    """
    entries = [*listing.train, *listing.test]
    paths = [os.fsencode(entry.path) for entry in entries]
    labels = np.array([entry.label for entry in entries], np.int64)
    if not listing.train:
        raise UserError(
            f"dataset.root: {', '.join(listing.lists)} in {str(listing.root)!r}: no image for training is listed"
        )
    _check_duplicates(listing.root, listing.lists, paths)
    facts = [get_local_facts(listing.root, name) for name in listing.lists] + find_facts(listing.root, paths)
    rows = {"train": np.arange(len(listing.train)), "test": np.arange(len(listing.train), len(paths))}
    rows = add_test_split({split: indices for split, indices in rows.items() if len(indices)}, paths, labels, dataset)
    if not listing.test and "test" in rows:
        count = count_things(len(rows["test"]), "image")
        drawn = f"no list of test images: {count} are drawn from those to train on (dataset.test_fraction)"
        fields["notes"] = (*fields.get("notes", ()), drawn)
    return kind(listing.classes, hash_facts(facts), labels, rows, listing.root, pa.array(paths, pa.binary()), **fields)


def _check_duplicates(root: Path, lists: tuple[str, ...], paths: list[bytes]) -> None:
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        where = f"{', '.join(lists)} in {str(root)!r}"
        raise UserError(
            f"dataset.root: {where}: {decode_path(twice)!r} is listed twice; valid: an image is in one split, once"
        )


def find_facts(root: Path, paths: Sequence[bytes], endings: tuple[bytes, ...] = IMAGE_ENDINGS) -> list[FileFacts]:
    """Returns the facts of each file; size and time are -1 if there is no such file with one of the endings."""
    wanted = set(paths)
    found: dict[bytes, FileFacts] = {}
    for folder in sorted({os.path.dirname(path) for path in paths}):
        found |= {
            path: get_entry_facts(path, entry) for path, entry in _scan_folder(root, folder, endings) if path in wanted
        }
    return [found.get(path, (path, -1, -1)) for path in paths]


def list_image_files(root: Path, folder: str) -> list[str]:
    """Returns the sorted paths of the image files directly in a folder below `root`; [] if there is no such folder.

    Raises:
        UserError: the folder is a link that leaves the root.
    """
    return [
        os.fsdecode(path)
        for path, _ in sorted(_scan_folder(root, os.fsencode(folder), IMAGE_ENDINGS), key=lambda found: found[0])
    ]


def _scan_folder(root: Path, folder: bytes, endings: tuple[bytes, ...]) -> list[tuple[bytes, os.DirEntry[bytes]]]:
    path = os.path.join(os.fsencode(root), folder)
    if not is_below(os.fsencode(root), path):
        raise UserError(
            f"dataset.root: {decode_path(path)!r} is a link that leaves the root; "
            "valid: dataset.root = a folder that holds the files"
        )
    try:
        with os.scandir(path) as scan:
            found = [
                entry for entry in scan if not entry.name.startswith(b".") and entry.name.lower().endswith(endings)
            ]
    except FileNotFoundError:
        return []
    return [(os.path.join(folder, entry.name), entry) for entry in found if not entry.is_dir()]

"""Image files that lists name, as most published sets have them; read as those of a folder are."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.files import Listed, below, fingerprint, text
from firstlight.pipeline.data.sources.folder import ENDINGS, Folder, listed
from firstlight.pipeline.data.sources.source import file_facts, with_test
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

AnyFolder = TypeVar("AnyFolder", bound=Folder)


class Entry(NamedTuple):
    """An image that a list names: it is one of the set, and if there is no such file, then reading it says so."""

    path: str  # relative to the root
    label: int  # -1 = unknown


class Listing(NamedTuple):
    """What the lists of a set say."""

    root: Path
    lists: tuple[str, ...]  # the files that said so
    classes: tuple[str, ...]
    train: Sequence[Entry]
    test: Sequence[Entry]  # () = carved out of the training split


def listed_source(kind: type[AnyFolder], listing: Listing, dataset: "Dataset", **fields: Any) -> AnyFolder:
    """A `kind` of source with the training images first, in the order of the lists; `fields`: what it has beside those of a folder.

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
    _check_once(listing.root, listing.lists, paths)
    facts = [file_facts(listing.root, name) for name in listing.lists] + facts_of(listing.root, paths)
    rows = {"train": np.arange(len(listing.train)), "test": np.arange(len(listing.train), len(paths))}
    rows = with_test({split: places for split, places in rows.items() if len(places)}, paths, labels, dataset)
    return kind(listing.classes, fingerprint(facts), labels, rows, listing.root, pa.array(paths, pa.binary()), **fields)


def _check_once(root: Path, lists: tuple[str, ...], paths: list[bytes]) -> None:
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        where = f"{', '.join(lists)} in {str(root)!r}"
        raise UserError(
            f"dataset.root: {where}: {text(twice)!r} is listed twice; valid: an image is in one split, once"
        )


def facts_of(root: Path, paths: Sequence[bytes], endings: tuple[bytes, ...] = ENDINGS) -> list[Listed]:
    """Size and time of each file, -1 where there is none with such an ending."""
    wanted = set(paths)
    found: dict[bytes, Listed] = {}
    for folder in sorted({os.path.dirname(path) for path in paths}):
        found |= {path: listed(path, entry) for path, entry in _scan(root, folder, endings) if path in wanted}
    return [found.get(path, (path, -1, -1)) for path in paths]


def files_in(root: Path, folder: str) -> list[str]:
    """Paths of the image files in a folder below `root`, not those in its folders, sorted; [] if there is no such folder.

    Raises:
        UserError: the folder is a link that leaves the root.
    """
    return [
        os.fsdecode(path) for path, _ in sorted(_scan(root, os.fsencode(folder), ENDINGS), key=lambda found: found[0])
    ]


def _scan(root: Path, folder: bytes, endings: tuple[bytes, ...]) -> list[tuple[bytes, os.DirEntry[bytes]]]:
    path = os.path.join(os.fsencode(root), folder)
    if not below(os.fsencode(root), path):
        raise UserError(
            f"dataset.root: {text(path)!r} is a link that leaves the root; valid: dataset.root = a folder that holds the files"
        )
    try:
        with os.scandir(path) as scan:
            found = [
                entry for entry in scan if not entry.name.startswith(b".") and entry.name.lower().endswith(endings)
            ]
    except FileNotFoundError:
        return []
    return [(os.path.join(folder, entry.name), entry) for entry in found if not entry.is_dir()]

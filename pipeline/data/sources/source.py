"""What a source is, and what all of them share: the split that is carved out, the fingerprint, the root on disk."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.sources.files import Listed, Local, Remote, fingerprint, local_path, text
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

__all__ = [
    "SUFFIXES",
    "Listed",
    "Part",
    "Record",
    "Source",
    "file_facts",
    "fingerprint",
    "local_root",
    "root_files",
    "text",
    "with_test",
]

# The last five are not decoded, but quarantined: a folder of a phone's photos must not lose half of them without a word
SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".avif", ".heic", ".heif", ".jp2", ".jxl"),
)


@dataclass(frozen=True)
class Part:
    """`count` images of one split from `start` on, in source order."""

    split: str
    start: int
    count: int


@dataclass(frozen=True)
class Record:
    """One image as found; `data` None: it could not be read, for `reason`."""

    path: str
    data: bytes | None
    label: int  # -1 = unknown
    reason: str | None = None
    annotation: Annotation | None = None
    annotated_in: str = ""  # the file that it was read from


@dataclass(frozen=True)
class Source(ABC):
    """A listing of n images; pickles to little more than its paths and labels."""

    kind: ClassVar[str]
    classes: tuple[str, ...]  # () = unlabelled
    fingerprint: str  # changes when the files do
    labels: np.ndarray  # (n,) int64
    rows: dict[str, np.ndarray]  # split -> places in the listing, ascending
    annotations: tuple[str, ...] = field(
        default=(), kw_only=True
    )  # columns of `annotations.COLUMNS` that every record has, sorted
    aside: str = field(default="", kw_only=True)  # what is there and belongs to no split, to tell the user
    subsets: dict[str, np.ndarray] = field(
        default_factory=dict, kw_only=True
    )  # name -> places; those of the training split count

    @property
    def splits(self) -> dict[str, int]:
        """Images per split, readable or not."""
        return {split: len(rows) for split, rows in self.rows.items()}

    def parts(self, rows: int) -> list[Part]:
        """All images in parts of at most `rows`, train first, in source order."""
        return [Part(split, k, min(rows, n - k)) for split, n in self.splits.items() for k in range(0, n, rows)]

    def read(self, part: Part) -> Iterator[Record]:
        """The images of a part, in source order. Raises nothing over a file: what cannot be read is a record with its reason."""
        return self._records(self.rows[part.split][part.start : part.start + part.count])

    @abstractmethod
    def _records(self, places: np.ndarray) -> Iterator[Record]: ...


def root_files(dataset: "Dataset") -> Local | Remote:
    """What is below `dataset.root`.

    Raises:
        UserError: it is missing, no folder, or a URI of an unknown kind.
    """
    if dataset.root is None:
        raise UserError(f"dataset.root: is missing; dataset.source {dataset.source!r} takes the folder of the images")
    try:
        root = local_path(dataset.root)
    except ValueError as error:
        raise UserError(f"dataset.root: {error}") from None
    if root is None:
        return Remote(dataset.root.rstrip("/"))
    if not root.exists():
        raise UserError(f"dataset.root: {str(root)!r} does not exist")
    if not root.is_dir():
        raise UserError(f"dataset.root: {str(root)!r} is a file; valid: the folder that holds the images")
    return Local(root)


def local_root(dataset: "Dataset") -> Path:
    """`dataset.root`, for a source that is read from disk only.

    Raises:
        UserError: as `root_files`, or it is not on disk.
    """
    files = root_files(dataset)
    if not isinstance(files, Local):
        raise UserError(
            f"dataset.root: {dataset.root!r} is not on this machine; dataset.source {dataset.source!r} takes a folder on disk"
        )
    return files.root


def file_facts(root: Path, name: str) -> Listed:
    return Local(root).facts(name)


def by_start(names: list[str]) -> dict[str, list[str]]:
    """Files by the split that their names begin with, `val` (`validation`) where there is no `test`; all are for training where none is so named."""
    train, test, val = ([name for name in names if name.startswith(start)] for start in ("train", "test", "val"))
    return {"train": train, "test": test or val} if train else {"train": names, "test": []}


def not_read(names: Iterable[str], why: str) -> str:
    """What `Source.aside` says of `names`; "" if there are none."""
    found = sorted(" ".join(name.split()) for name in names)
    return f"not read, {why}: {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}" if found else ""


def with_test(
    rows: dict[str, np.ndarray], keys: list[bytes], labels: np.ndarray, dataset: "Dataset"
) -> dict[str, np.ndarray]:
    """Where there is no test split, the images of each class with the lowest hashes of (split_seed, key) become it.

    A hash per image, and not a draw over all of them: images that are added later move few of the others. Each class keeps one for training.
    """
    if "test" in rows:
        return rows
    places = rows["train"]
    ranks = np.array([rank(dataset.split_seed, keys[place]) for place in places.tolist()], np.uint64)
    test = lowest(ranks, labels[places], dataset.test_fraction)
    return {"train": places[~test], "test": places[test]} if test.any() else rows


def lowest(ranks: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """(n,) bool: the images of each class with the lowest ranks, `fraction` of it but never all."""
    _, kinds, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((ranks, kinds))
    position = np.empty(len(ranks), np.int64)
    position[order] = np.arange(len(ranks)) - np.repeat(np.cumsum(counts) - counts, counts)
    quota = np.minimum(np.floor(counts * fraction + 0.5).astype(np.int64), counts - 1)
    return np.asarray(position < quota[kinds])


def rank(seed: int, key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"%d\0%s" % (seed, key)).digest()[:8], "big")

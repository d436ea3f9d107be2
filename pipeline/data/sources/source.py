"""The contract of a source, and what all sources share: the root, parts, and a test split where a source has none."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.sources.files import (
    FileFacts,
    LocalFiles,
    parse_local_path,
)
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.errors import UserError

# Images of the last five formats are not decoded but quarantined, so that a folder of photos from a phone does not lose
# half of them silently.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".avif", ".heic", ".heif", ".jp2", ".jxl"),
)


class SourceOptions(Protocol):
    """The options of a recipe's section `dataset` that sources read. `config.dataset.DatasetOptions` describes each."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def root(self) -> str | None: ...

    @property
    def list(self) -> str | None: ...

    @property
    def download(self) -> bool: ...

    @property
    def image_column(self) -> str: ...

    @property
    def path_column(self) -> str: ...

    @property
    def label_column(self) -> str | None: ...

    @property
    def split_column(self) -> str | None: ...

    @property
    def annotations(self) -> tuple[str, ...] | None: ...

    @property
    def test_fraction(self) -> float: ...

    @property
    def split_seed(self) -> int: ...

    @property
    def max_pixels(self) -> int: ...


@dataclass(frozen=True)
class SourcePart:
    """`count` images of one split, from position `start` on, in the order of the source."""

    split: str
    start: int
    count: int


@dataclass(frozen=True)
class Record:
    """One image as the source has it. `data` is None if the image could not be read, for `reason`."""

    path: str
    data: bytes | None
    # -1 = unknown
    label: int
    reason: str | None = None
    annotation: Annotation | None = None
    # The file that the annotation was read from
    annotation_file: str = ""


@dataclass(frozen=True)
class Source(ABC):
    """A listing of n images. Pickled, it is little larger than its paths and labels."""

    kind: ClassVar[str]
    # () = unlabelled
    classes: tuple[str, ...]
    # Changes when the files do
    fingerprint: str
    # (n,) int64, -1 = unknown
    labels: np.ndarray
    # Split -> ascending indices of its images in the listing
    rows: dict[str, np.ndarray]
    # Sorted names of columns of `annotations.COLUMNS` that every record has
    annotations: tuple[str, ...] = field(default=(), kw_only=True)
    # Files that are present but belong to no split, as a note for the user
    unread_note: str = field(default="", kw_only=True)
    # Name -> indices in the listing; only those of the training split count
    subsets: dict[str, np.ndarray] = field(default_factory=dict, kw_only=True)

    @property
    def splits(self) -> dict[str, int]:
        """Number of images of each split, readable or not."""
        return {split: len(rows) for split, rows in self.rows.items()}

    def split_into_parts(self, rows: int) -> list[SourcePart]:
        """Returns all images in parts of at most `rows`, the training split first, in the order of the source."""
        return [SourcePart(split, k, min(rows, n - k)) for split, n in self.splits.items() for k in range(0, n, rows)]

    def read(self, part: SourcePart) -> Iterator[Record]:
        """Yields the images of a part, in the order of the source.

        A file that cannot be read raises nothing: it becomes a record with its reason.
        """
        return self._read_records(self.rows[part.split][part.start : part.start + part.count])

    @abstractmethod
    def _read_records(self, indices: np.ndarray) -> Iterator[Record]: ...


def open_root(root: str | None, source: str) -> LocalFiles | RemoteFiles:
    """Returns the files below `root`, the value of `dataset.root`.

    Raises:
        UserError: it is missing, is no folder, or is a URI of an unknown scheme.
    """
    if root is None:
        raise UserError(f"dataset.root: is missing; dataset.source {source!r} takes the folder of the images")
    try:
        folder = parse_local_path(root)
    except ValueError as error:
        raise UserError(f"dataset.root: {error}") from None
    if folder is None:
        return RemoteFiles(root.rstrip("/"))
    if not folder.exists():
        raise UserError(f"dataset.root: {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise UserError(f"dataset.root: {str(folder)!r} is a file; valid: the folder that holds the images")
    return LocalFiles(folder)


def open_local_root(dataset: SourceOptions) -> Path:
    """Returns `dataset.root`, for a source that can only be read from disk.

    Raises:
        UserError: the root is not on disk, or as `open_root`.
    """
    files = open_root(dataset.root, dataset.source)
    if not isinstance(files, LocalFiles):
        raise UserError(
            f"dataset.root: {dataset.root!r} is not on this machine; "
            f"dataset.source {dataset.source!r} takes a folder on disk"
        )
    return files.root


def get_local_facts(root: Path, name: str) -> FileFacts:
    """Returns the facts of a file below a folder on disk."""
    return LocalFiles(root).get_facts(name)


def split_by_prefix(names: list[str]) -> dict[str, list[str]]:
    """Returns the files of the training and the test split, by the start of their names.

    The test split is `test`, or `val` (`validation`) if no name starts with `test`. If no name starts with `train`, all
    files are training files.
    """
    train, test, val = ([name for name in names if name.startswith(prefix)] for prefix in ("train", "test", "val"))
    return {"train": train, "test": test or val} if train else {"train": names, "test": []}


def describe_unread(names: Iterable[str], why: str) -> str:
    """Returns the text of `Source.unread_note` for files that are not read; "" if there are no names."""
    listed = sorted(" ".join(name.split()) for name in names)
    return f"not read, {why}: {', '.join(listed[:5])}{' ...' if len(listed) > 5 else ''}" if listed else ""


def add_test_split(
    rows: dict[str, np.ndarray], keys: list[bytes], labels: np.ndarray, dataset: SourceOptions
) -> dict[str, np.ndarray]:
    """Returns `rows` with a test split: if it has none, the images of each class with the lowest `hash_rank` become it.

    A hash of each image is used instead of one draw over all images, so that images that are added later move few
    others. Each class keeps at least one image for training.
    """
    if "test" in rows:
        return rows
    indices = rows["train"]
    ranks = np.array([hash_rank(dataset.split_seed, keys[index]) for index in indices.tolist()], np.uint64)
    test = select_lowest(ranks, labels[indices], dataset.test_fraction)
    return {"train": indices[~test], "test": indices[test]} if test.any() else rows


def select_lowest(ranks: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Returns (n,) bool: the images with the lowest ranks of each class, `fraction` of it but never all of it."""
    _, kinds, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((ranks, kinds))
    position = np.empty(len(ranks), np.int64)
    position[order] = np.arange(len(ranks)) - np.repeat(np.cumsum(counts) - counts, counts)
    quota = np.minimum(np.floor(counts * fraction + 0.5).astype(np.int64), counts - 1)
    return np.asarray(position < quota[kinds])


def hash_rank(seed: int, key: bytes) -> int:
    """Returns 64 bits of the SHA-256 of a split seed and the key of an image."""
    return int.from_bytes(hashlib.sha256(b"%d\0%s" % (seed, key)).digest()[:8], "big")

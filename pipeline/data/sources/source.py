"""The contract of a source, and what all sources share: the root and parts."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.images.orientation import AnnotatedFrame
from firstlight.pipeline.data.sources.conventions.reading import MAX_LISTED_CLASSES, describe_classes, join_names
from firstlight.pipeline.data.sources.conventions.split_names import SPLIT_TITLES
from firstlight.pipeline.data.sources.files import FileFacts, Files, LocalFiles, parse_local_path
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.errors import UserError


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
    def mask_values(self) -> Mapping[str, tuple[int | str, ...]]: ...

    @property
    def annotated_orientation(self) -> AnnotatedFrame | None: ...

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]] | None: ...

    @property
    def follow_links(self) -> bool: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def label_case(self) -> str: ...

    @property
    def missing_labels(self) -> tuple[str, ...]: ...

    @property
    def encoding(self) -> str | None: ...

    @property
    def delimiter(self) -> str | None: ...

    @property
    def test_fraction(self) -> float | None: ...

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


class SourceFiles(NamedTuple):
    """Files that a source reads. `besides`: a hash of what decides the images in addition to their bytes."""

    files: Files
    names: Sequence[bytes]
    besides: str = ""


@dataclass(frozen=True)
class Source(ABC):
    """A listing of n images. Pickled, it is little larger than its paths and labels."""

    kind: ClassVar[str]
    # () = unlabelled
    classes: tuple[str, ...]
    # Changes when the files do, see identity.py
    fingerprint: str
    # (n,) int64, -1 = unknown
    labels: np.ndarray
    # Split -> ascending indices of its images in the listing
    rows: dict[str, np.ndarray]
    # Sorted names of columns of `annotations.COLUMNS` that every record has
    annotations: tuple[str, ...] = field(default=(), kw_only=True)
    # The conventions that were assumed, and the facts to look at: each a line for the user, without the location of the
    # source
    reading: tuple[str, ...] = field(default=(), kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    # True if the test split is, or would be, drawn from the training split: the source has none of its own
    draws_test: bool = field(default=False, kw_only=True)
    # The text that `fingerprint` is made of, and the fingerprint of earlier versions; "" for a source without files
    identity: str = field(default="", kw_only=True)
    earlier_fingerprint: str = field(default="", kw_only=True)
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

    def list_files(self) -> SourceFiles | None:
        """Returns the files that decide the images, whose bytes become part of the fingerprint; None without files."""
        return None

    @abstractmethod
    def _read_records(self, indices: np.ndarray) -> Iterator[Record]: ...


def open_root(root: str | None, source: str, follow_links: bool = False) -> LocalFiles | RemoteFiles:
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
    if root.startswith("hf://"):
        raise UserError(
            f"dataset.root: {root!r} is not valid with dataset.source {source!r}; valid: dataset.source=hugging_face"
        )
    if folder is None:
        return RemoteFiles(root.rstrip("/"))
    if not folder.exists():
        raise UserError(f"dataset.root: {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise UserError(f"dataset.root: {str(folder)!r} is a file; valid: the folder that holds the images")
    return LocalFiles(folder, follow_links)


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


def describe_listing(source: Source) -> tuple[str, ...]:
    """Returns lines about a source that tells nothing itself, as published sets, whose layout is known."""
    splits = [f"{SPLIT_TITLES.get(split, split)} {count:,}" for split, count in source.splits.items()]
    lines = [f"read {sum(source.splits.values()):,} images: {', '.join(splits)}"]
    if source.annotations:
        names = join_names(source.classes, MAX_LISTED_CLASSES)
        return (*lines, f"annotations {', '.join(source.annotations)}, of {len(source.classes):,} classes: {names}")
    return (*lines, *describe_classes(source.classes, source.labels, source.rows))

"""The store: encoded images in Parquet shards, and a manifest that is written last.

A folder with a readable `manifest.json` is a finished store. Pages carry checksums that are verified at every read, so a damaged disk
ends in an error that names the file, never in another image.
"""

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.annotations import COLUMNS, Annotation, present_rows, unpacked
from firstlight.pipeline.data.parquet import parquet_file, parquet_table
from firstlight.pipeline.errors import UserError, suggest_valid

FORMAT = 3
ROW_GROUP = 128  # rows: what one random access reads and verifies
GROUP_BYTES = 16_000_000  # encoded images of a row group, at most (but for a single larger image)
CACHE_BYTES = 128_000_000  # encoded images kept per process
ANNOTATION_BYTES = 32_000_000  # annotations kept per process
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"  # path, split, reason: what cannot be decoded has no id
DUPLICATES = "duplicates.parquet"  # id, first_id, split, path: images whose bytes an earlier one has
SUBSETS = "subsets.parquet"  # subset, id: named parts of the training split; only where the source has some
# Of every shard; beside them, columns of annotations. digest: the first 8 bytes of the sha256 of `image`, big-endian
SCHEMA = pa.schema(
    [("id", pa.int64()), ("image", pa.binary()), ("label", pa.int64()), ("path", pa.string()), ("digest", pa.uint64())]
)
SHARD_NAME = re.compile(r"^[a-z]+-\d{5,}\.parquet$")
# What pyarrow raises over a damaged file, from its own errors to a length that does not fit the memory
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError)

Group = tuple[np.ndarray, list[bytes], np.ndarray]  # ids (r,) int64, encoded images, labels (r,) int64
Read = TypeVar("Read", Group, list[Annotation])  # of a row group


@dataclass(frozen=True)
class Shard:
    """One file: ids `first_id` .. `first_id + count - 1`, in order; `row_groups` are the rows of each."""

    file: str
    split: str
    first_id: int
    count: int
    row_groups: tuple[int, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Earlier:
    """A store that this one extends: its images are those with the ids 0 .. `ids` - 1."""

    name: str  # of its folder
    hash: str
    ids: int


@dataclass(frozen=True)
class Store:
    """A finished store. Cheap to pickle: what was read is cached per process, not in the object."""

    path: Path
    classes: tuple[str, ...]  # () = unlabelled
    splits: dict[str, int]  # images of each; the shards say which
    shards: tuple[Shard, ...]  # in id order; where a store was extended, those of the splits alternate
    extends: tuple[Earlier, ...]  # oldest first; () = written at once
    quarantined: int
    hash: str
    source: dict[str, Any]  # kind, root, fingerprint; aside, where something belongs to no split
    images: dict[str, Any]  # as `census.total`; duplicates: as `write_duplicates`
    annotations: tuple[str, ...] = ()  # columns of `annotations.COLUMNS` that the shards have, sorted
    subsets: dict[str, Any] = field(default_factory=dict)  # as `write_subsets`

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Read and check the manifest, and that every shard is there with its size (`verify` reads the contents).

        Raises:
            UserError: naming the file that is missing or damaged, and the repair.
        """
        file = path / MANIFEST
        try:
            raw = json.loads(file.read_bytes())
            store = _parse(path, raw)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}; {repair(path)}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: is not a manifest of format {FORMAT} ({_line(error)}); {repair(path)}") from None
        if manifest_hash(raw) != store.hash:
            raise UserError(f"{file}: is damaged: its contents do not have the hash it states; {repair(path)}")
        for shard in store.shards:
            store._check_size(shard)
        return store

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read every shard and compare its sha256; `progress(done, total)` is called with numbers of images after each.

        Raises:
            UserError: naming the shard that is missing or differs, and the repair.
        """
        total = sum(shard.count for shard in self.shards)
        for shard in self.shards:
            self._check_size(shard)
            try:
                found = file_sha256(self.path / shard.file)
            except OSError as error:
                raise self._damaged(shard, error.strerror or type(error).__name__) from None
            if found != shard.sha256:
                raise self._damaged(shard, "its sha256 is not the manifest's")
            progress(shard.first_id + shard.count, total)
        self._subset_rows()

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of every image, in pixels; None: they differ, or the manifest does not tell."""
        (width, widest), (height, highest) = (self.images.get(side, (0, 1)) for side in ("width", "height"))
        return (width, height) if (width, height) == (widest, highest) else None

    @property
    def labelled(self) -> bool:
        return len(self.classes) > 0

    def ids(self, split: str) -> np.ndarray:
        """(count,) int64, ascending; empty where there is no such split."""
        parts = [
            np.arange(shard.first_id, shard.first_id + shard.count) for shard in self.shards if shard.split == split
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def labels(self, split: str | None = None) -> np.ndarray:
        """(count,) int64, row i = the image `ids(split)[i]`; -1 = unknown. None: of all images, row i = the image with id i.

        Raises:
            UserError: a shard is damaged.
        """
        parts = [self._column(shard) for shard in self.shards if split in (None, shard.split)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def paths(self, ids: np.ndarray) -> list[str | None]:
        """Where the images of the (n,) sorted ids came from; None where the source does not tell.

        Raises:
            UserError: a shard is damaged.
        """
        found: list[str | None] = []
        for shard in self.shards:
            here = ids[slice(*np.searchsorted(ids, [shard.first_id, shard.first_id + shard.count]))]
            if len(here):
                found += self._read_column(shard, "path").take(pa.array(here - shard.first_id)).to_pylist()
        return found

    def groups(self, split: str) -> np.ndarray:
        """(k, 3) int64: shard index, row group index, first id; one row per row group, in id order."""
        mine = [index for index, shard in enumerate(self.shards) if shard.split == split]
        rows = self._groups
        return rows[np.isin(rows[:, 0], mine)]

    @property
    def edges(self) -> list[int]:
        """0, how many images each of the extended stores had, and how many there are: ids between two of them came at one time."""
        return [0, *(earlier.ids for earlier in self.extends), sum(self.splits.values())]

    def read_group(self, shard_index: int, group_index: int) -> Group:
        """ids (r,), the r encoded images, labels (r,) of one row group. Shared with the cache: not to be changed.

        Raises:
            UserError: the shard is damaged.
        """
        shard = self.shards[shard_index]
        key = (str(self.path), self.hash, shard.file, group_index)
        group = _cache.get(key)
        if group is None:
            group = self._load(shard, group_index)
            _cache.put(key, group)
        return group

    def read(self, ids: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """(B,) ids, in any order and repeated at will -> B encoded images and labels (B,); each row group is touched once.

        Raises:
            IndexError: naming the first id that the store does not have.
            UserError: a shard is damaged.
        """
        images, labels = [b""] * len(ids), np.empty(len(ids), np.int64)
        for shard, group, rows, within in self._by_group(ids):
            _, encoded, known = self.read_group(shard, group)
            labels[rows] = known[within]
            for row, k in zip(rows.tolist(), within.tolist(), strict=True):
                images[row] = encoded[k]
        return images, labels

    def _by_group(self, ids: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Each row group that holds some of `ids`: shard index, row group index, which of `ids` those are, and their rows in the group."""
        ids = np.asarray(ids, np.int64)
        total = sum(self.splits.values())
        wrong = ids[(ids < 0) | (ids >= total)]
        if len(wrong):
            raise IndexError(f"id {wrong[0]} is not in the store {self.path}: its ids are 0..{total - 1}")
        place = np.searchsorted(self._groups[:, 2], ids, side="right") - 1
        order = np.argsort(place, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(place[order])) + 1) if len(ids) else ():
            shard, group, first = self._groups[place[rows[0]]].tolist()
            yield shard, group, rows, ids[rows] - first

    def annotated(self, ids: np.ndarray) -> list[Annotation]:
        """(B,) ids, in any order and repeated at will -> their annotations, shared with the cache: not to be changed. Images are not read.

        Raises:
            UserError: the store has no annotations, or a shard is damaged.
            IndexError: naming the first id that the store does not have.
        """
        if not self.annotations:
            raise UserError(
                f"{self.path}: has no annotations; valid: a store of a source that has some (dataset.annotations)"
            )
        found = [_NOTHING] * len(ids)
        for shard, group, rows, within in self._by_group(ids):
            key = (str(self.path), self.hash, self.shards[shard].file, group)
            known = _annotation_cache.get(key)
            if known is None:
                known = self._load_annotations(self.shards[shard], group)
                _annotation_cache.put(key, known)
            for row, k in zip(rows.tolist(), within.tolist(), strict=True):
                found[row] = known[k]
        return found

    def present(self, split: str) -> np.ndarray:
        """(count, classes) int8, row i = the i-th image of `ids`: 1 the class occurs, 0 it does not, -1 it is not known.

        Raises:
            UserError: the store does not tell, or a shard is damaged.
        """
        if "present" not in self.annotations:
            raise UserError(
                f"{self.path}: does not tell which classes occur; it has {', '.join(self.annotations) or 'no annotations'}"
            )
        parts = [self._present(shard) for shard in self.shards if shard.split == split]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.int8)

    @property
    def subset_names(self) -> tuple[str, ...]:
        return tuple(sorted(self.subsets.get("images", {})))

    def subset(self, name: str) -> np.ndarray:
        """Ids (k,) int64 of a named part of the training split, sorted.

        Raises:
            UserError: there is none of this name, or their file is damaged.
        """
        if name not in self.subset_names:
            advice = suggest_valid(name, self.subset_names) if self.subset_names else "it has none"
            raise UserError(f"subset: {name!r} is not in the store {self.path}; {advice}")
        return self._subset_rows()[name]

    @cached_property
    def _groups(self) -> np.ndarray:
        """(k, 3) as `groups`, over all splits."""
        rows = []
        for index, shard in enumerate(self.shards):
            starts = shard.first_id + np.cumsum((0, *shard.row_groups[:-1]))
            rows += [(index, group, int(start)) for group, start in enumerate(starts)]
        return np.array(rows, np.int64).reshape(-1, 3)

    def _load(self, shard: Shard, group: int) -> Group:
        try:
            with parquet_file(self.path / shard.file) as file:
                table = file.read_row_group(group, columns=["id", "image", "label"], use_threads=False)
            ids, labels = (table.column(name).to_numpy() for name in ("id", "label"))
            images = table.column("image").to_pylist()
        except DAMAGE as error:
            raise self._damaged(shard, _line(error)) from None
        first = shard.first_id + sum(shard.row_groups[:group])
        if not np.array_equal(ids, np.arange(first, first + shard.row_groups[group])) or None in images:
            raise self._damaged(shard, f"row group {group} does not hold the ids of the manifest")
        return ids, images, labels

    def _load_annotations(self, shard: Shard, group: int) -> list[Annotation]:
        try:
            with parquet_file(self.path / shard.file) as file:
                found = unpacked(
                    file.read_row_group(group, columns=list(self.annotations), use_threads=False), len(self.classes)
                )
        except DAMAGE as error:
            raise self._damaged(shard, _line(error)) from None
        if len(found) != shard.row_groups[group]:
            raise self._damaged(
                shard, f"row group {group} has {len(found)} rows, the manifest says {shard.row_groups[group]}"
            )
        return found

    def _present(self, shard: Shard) -> np.ndarray:
        try:
            with parquet_file(self.path / shard.file) as file:
                column = file.read(columns=["present"], use_threads=False).column("present")
            found = present_rows(column.combine_chunks(), len(self.classes))
        except DAMAGE as error:
            raise self._damaged(shard, _line(error)) from None
        if len(found) != shard.count:
            raise self._damaged(shard, f"it has {len(found)} rows, the manifest says {shard.count}")
        return found

    def _subset_rows(self) -> dict[str, np.ndarray]:
        """Sorted ids by subset."""
        if not self.subsets:
            return {}
        file = self.path / SUBSETS
        try:
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.subsets["sha256"]:
                raise ValueError("its sha256 is not the manifest's")
            table = parquet_table(pa.BufferReader(content))
            names, ids = table.column("subset").to_numpy(), table.column("id").to_numpy()
        except DAMAGE as error:
            raise UserError(f"{file}: is missing or damaged: {_line(error)}; {repair(self.path)}") from None
        return {name: ids[names == name] for name in self.subsets["images"]}

    def _read_column(self, shard: Shard, name: str) -> Any:
        try:
            with parquet_file(self.path / shard.file) as file:
                return file.read(columns=[name], use_threads=False).column(name).combine_chunks()
        except DAMAGE as error:
            raise self._damaged(shard, _line(error)) from None

    def _column(self, shard: Shard) -> np.ndarray:
        labels: np.ndarray = self._read_column(shard, "label").to_numpy(zero_copy_only=False)
        if labels.shape != (shard.count,) or labels.dtype != np.int64:
            raise self._damaged(shard, f"it has {len(labels)} rows, the manifest says {shard.count}")
        return labels

    def _check_size(self, shard: Shard) -> None:
        try:
            size = (self.path / shard.file).stat().st_size
        except OSError as error:
            raise self._damaged(shard, error.strerror or type(error).__name__) from None
        if size != shard.bytes:
            raise self._damaged(shard, f"it has {size} bytes, the manifest says {shard.bytes}")

    def _damaged(self, shard: Shard, why: str) -> UserError:
        return UserError(f"{self.path / shard.file}: is missing or damaged: {why}; {repair(self.path)}")


class _Cache(Generic[Read]):
    """What was read last of row groups, up to a number of bytes; safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._groups: OrderedDict[tuple[Any, ...], Read] = OrderedDict()

    def get(self, key: tuple[Any, ...]) -> Read | None:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)

    def put(self, key: tuple[Any, ...], group: Read) -> None:
        with self._lock:
            if key in self._groups:
                return
            self._groups[key] = group
            self._size += _weight(group)
            while self._size > self._limit and len(self._groups) > 1:
                self._size -= _weight(self._groups.popitem(last=False)[1])


def _weight(group: Group | list[Annotation]) -> int:
    """Bytes; beside what they hold, an image with its two numbers costs about 100, an annotation with its arrays about 500."""
    if isinstance(group, list):
        return sum(
            500 + len(found.mask or b"") + sum(a.nbytes for a in (found.present, found.boxes) if a is not None)
            for found in group
        )
    return sum(map(len, group[1])) + 100 * len(group[1])


_NOTHING = Annotation()
_cache: _Cache[Group] = _Cache(CACHE_BYTES)
_annotation_cache: _Cache[list[Annotation]] = _Cache(ANNOTATION_BYTES)


def schema(annotations: Sequence[str]) -> pa.Schema:
    """Of the shards of a store with these columns of `annotations.COLUMNS`."""
    return pa.schema([*SCHEMA, *((name, COLUMNS[name]) for name in annotations)])


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def manifest_hash(raw: dict[str, Any]) -> str:
    """sha256 of a manifest without its own hash and without where the source lay."""
    source = {key: value for key, value in raw["source"].items() if key != "root"}
    return hashlib.sha256(canonical({**{k: v for k, v in raw.items() if k != "hash"}, "source": source})).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(path: Path, raw: dict[str, Any]) -> Store:
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r}")
    shards = tuple(Shard(**{**entry, "row_groups": tuple(entry["row_groups"])}) for entry in raw["shards"])
    splits = {str(name): int(count) for name, count in raw["splits"].items()}
    extends = tuple(Earlier(str(entry["name"]), str(entry["hash"]), int(entry["ids"])) for entry in raw["extends"])
    _check_order(shards, splits, extends)
    facts = int(raw["quarantined"]), str(raw["hash"]), dict(raw["source"]), dict(raw.get("images", {}))
    annotations = tuple(raw.get("annotations", ()))
    if list(annotations) != sorted(COLUMNS.keys() & set(annotations)):
        raise ValueError(f"annotations {annotations!r}")
    return Store(
        path,
        tuple(map(str, raw["classes"])),
        splits,
        shards,
        extends,
        *facts,
        annotations,
        dict(raw.get("subsets", {})),
    )


def _check_order(shards: tuple[Shard, ...], splits: dict[str, int], extends: tuple[Earlier, ...]) -> None:
    """Ids must be 0..n-1 without gaps, and a name must not lead out of the folder."""
    expected, found = 0, dict.fromkeys(splits, 0)
    for shard in shards:
        whole = min(shard.row_groups) >= 1 and shard.count == sum(shard.row_groups)
        if not SHARD_NAME.match(shard.file) or shard.first_id != expected or not whole:
            raise ValueError(f"shard {shard.file!r} does not follow the one before it")
        expected, found[shard.split] = expected + shard.count, found[shard.split] + shard.count
    if found != splits:
        raise ValueError("the splits and the shards differ")
    edges = [0, *(earlier.ids for earlier in extends), expected]
    if edges != sorted(edges):
        raise ValueError("the extended stores have more images than there are")


def repair(path: Path) -> str:
    """What to do about a damaged store, as the end of a `UserError`."""
    return f"delete the folder {path} and run again: prepare writes it anew"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

"""Reads the shards of a store, row group by row group, and caches what was read per process."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.annotations import Annotation, unpack_columns
from firstlight.pipeline.data.manifest import DAMAGE_ERRORS, Shard, advise_repair
from firstlight.pipeline.data.mirror.places import fetch_missing
from firstlight.pipeline.data.parquet import open_parquet_file
from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.records import DamagedRecord

# Limits of the caches of a process.
IMAGE_CACHE_BYTES = 128_000_000
ANNOTATION_CACHE_BYTES = 32_000_000
# Memory of a cached image with its two numbers, and of an annotation with its arrays, apart from their contents.
IMAGE_OVERHEAD_BYTES, ANNOTATION_OVERHEAD_BYTES = 100, 500

# ids (r,) int64, r encoded images, labels (r,) int64
RowGroup = tuple[np.ndarray, list[bytes], np.ndarray]
Cached = TypeVar("Cached", RowGroup, list[Annotation])


class RowGroupCache(Generic[Cached]):
    """The row groups that were read last, up to `limit` bytes. It is safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._groups: OrderedDict[tuple[Any, ...], Cached] = OrderedDict()

    def get(self, key: tuple[Any, ...]) -> Cached | None:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)

    def put(self, key: tuple[Any, ...], group: Cached) -> None:
        with self._lock:
            if key in self._groups:
                return
            self._groups[key] = group
            self._size += _count_cached_bytes(group)
            while self._size > self._limit and len(self._groups) > 1:
                self._size -= _count_cached_bytes(self._groups.popitem(last=False)[1])


def _count_cached_bytes(group: RowGroup | list[Annotation]) -> int:
    if isinstance(group, list):
        return sum(
            ANNOTATION_OVERHEAD_BYTES
            + len(found.mask or b"")
            + sum(array.nbytes for array in (found.present, found.boxes) if array is not None)
            for found in group
        )
    return sum(map(len, group[1])) + IMAGE_OVERHEAD_BYTES * len(group[1])


image_cache: RowGroupCache[RowGroup] = RowGroupCache(IMAGE_CACHE_BYTES)
annotation_cache: RowGroupCache[list[Annotation]] = RowGroupCache(ANNOTATION_CACHE_BYTES)


def read_row_group(folder: Path, shard: Shard, group: int) -> RowGroup:
    """Reads ids, encoded images and labels of a row group, without the cache.

    Raises:
        UserError: the shard is damaged.
    """
    columns = ["id", "image", "label"]
    try:
        with open_parquet_file(find_shard(folder, shard)) as file:
            table = file.read_row_group(group, columns=columns, use_threads=False)
        ids, labels = (table.column(name).to_numpy() for name in ("id", "label"))
        images = table.column("image").to_pylist()
    except DAMAGE_ERRORS as error:
        raise damaged_shard_error(folder, shard, error) from None
    first = shard.first_id + sum(shard.row_groups[:group])
    if not np.array_equal(ids, np.arange(first, first + shard.row_groups[group])) or None in images:
        raise damaged_shard_error(folder, shard, f"row group {group} does not hold the ids of the manifest")
    return ids, images, labels


def read_annotation_group(
    folder: Path, shard: Shard, group: int, columns: tuple[str, ...], num_classes: int
) -> list[Annotation]:
    """Reads the annotations of a row group, without the cache. Images are not read.

    Raises:
        UserError: the shard is damaged.
    """
    try:
        with open_parquet_file(find_shard(folder, shard)) as file:
            table = file.read_row_group(group, columns=list(columns), use_threads=False)
        found = unpack_columns(table, num_classes)
    except DAMAGE_ERRORS as error:
        raise damaged_shard_error(folder, shard, error) from None
    if len(found) != shard.row_groups[group]:
        problem = f"row group {group} has {len(found)} rows, the manifest says {shard.row_groups[group]}"
        raise damaged_shard_error(folder, shard, problem)
    return found


def read_label_column(folder: Path, shard: Shard) -> np.ndarray:
    """Reads the column `label` of a shard as (count,) int64.

    Raises:
        UserError: the shard is damaged.
    """
    labels: np.ndarray = read_column(folder, shard, "label").to_numpy(zero_copy_only=False)
    if labels.shape != (shard.count,) or labels.dtype != np.int64:
        raise damaged_shard_error(folder, shard, f"it has {len(labels)} rows, the manifest says {shard.count}")
    return labels


def read_column(folder: Path, shard: Shard, name: str) -> pa.Array:
    """Reads a column of a shard.

    Raises:
        UserError: the shard is damaged.
    """
    try:
        return _read_whole_column(find_shard(folder, shard), name)
    except DAMAGE_ERRORS as error:
        raise damaged_shard_error(folder, shard, error) from None


def _read_whole_column(path: Path, name: str) -> pa.Array:
    with open_parquet_file(path) as file:
        return file.read(columns=[name], use_threads=False).column(name).combine_chunks()


def find_shard(folder: Path, shard: Shard) -> Path:
    """Returns the file of a shard. One that is in a bucket only is downloaded.

    Raises:
        DamagedRecord, OSError: the object is damaged or cannot be read.
    """
    file = folder / shard.file
    fetch_missing(file, {"bytes": shard.bytes, "sha256": shard.sha256})
    return file


def check_shard_size(folder: Path, shard: Shard) -> None:
    """Raises UserError unless the file has the size that the manifest says."""
    try:
        size = find_shard(folder, shard).stat().st_size
    except OSError as error:
        raise damaged_shard_error(folder, shard, error.strerror or type(error).__name__) from None
    except DamagedRecord as error:
        raise damaged_shard_error(folder, shard, str(error)) from None
    if size != shard.bytes:
        raise damaged_shard_error(folder, shard, f"it has {size} bytes, the manifest says {shard.bytes}")


def damaged_shard_error(folder: Path, shard: Shard, why: str | BaseException) -> UserError:
    """Returns the error about a shard that is missing or damaged, with the repair."""
    reason = why if isinstance(why, str) else describe_damage(why)
    return UserError(f"{folder / shard.file}: is missing or damaged: {reason}; {advise_repair(folder)}")


def describe_damage(error: BaseException) -> str:
    """Returns type and text of an exception on one line."""
    return one_line(f"{type(error).__name__}: {error}")

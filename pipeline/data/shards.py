"""Shards of the store, one Parquet file each: written whole or not at all."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.annotations import BOX, columns_in
from firstlight.pipeline.data.parquet import parquet_file
from firstlight.pipeline.data.store import GROUP_BYTES, ROW_GROUP, Shard, file_sha256, schema
from firstlight.pipeline.files import atomic_path

# The images are compressed already; statistics and a dictionary of them would only copy them
LAYOUT: dict[str, Any] = {
    "compression": {"id": "zstd", "image": "none", "label": "zstd", "path": "zstd", "digest": "none"},
    "use_dictionary": False,
    "write_statistics": ["id", "label"],
    "write_page_checksum": True,
}

Row = tuple[Any, ...]  # encoded image: bytes, label: int, path: str, and the values of the columns of annotations


def write_shard(folder: Path, shard: Shard, rows: Iterable[Row], annotations: Sequence[str] = ()) -> Shard | None:
    """Write `rows` with the ids from shard.first_id on under shard.file, whole or not at all; None if there are no rows.

    `annotations`: the columns of `annotations.COLUMNS` that the rows have.
    """
    columns = schema(annotations)
    groups: list[int] = []
    with atomic_path(folder / shard.file) as temporary:
        with pq.ParquetWriter(temporary, columns, **_layout(columns)) as writer:
            for group in _groups(rows):
                images, labels, paths, *rest = zip(*group, strict=True)
                ids = np.arange(len(group), dtype=np.int64) + shard.first_id + sum(groups)
                digests = np.array([digest(image) for image in images], np.uint64)
                values = [
                    pa.array(values, columns.field(name).type) for name, values in zip(annotations, rest, strict=True)
                ]
                writer.write_table(
                    pa.table([ids, pa.array(images, pa.binary()), labels, paths, digests, *values], schema=columns)
                )
                groups.append(len(group))
        if not groups:
            return None
        size, sha256 = temporary.stat().st_size, file_sha256(temporary)
    return replace(shard, count=sum(groups), row_groups=tuple(groups), bytes=size, sha256=sha256)


def _layout(columns: pa.Schema) -> dict[str, Any]:
    """LAYOUT, and annotations compressed, but for masks, which are PNG."""
    known = columns_in(columns.names)
    leaves = {
        "boxes": [f"boxes.list.element.{side.name}" for side in BOX],
        "mask": ["mask"],
        "present": ["present.list.element"],
    }
    extra = {leaf: "none" if name == "mask" else "zstd" for name in known for leaf in leaves[name]}
    return {**LAYOUT, "compression": {**LAYOUT["compression"], **extra}}


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Row groups of ROW_GROUP images, or of fewer where these would be more than GROUP_BYTES: a group is read as a whole."""
    group: list[Row] = []
    weight = 0
    for row in rows:
        if group and (len(group) == ROW_GROUP or weight + _weight(row) > GROUP_BYTES):
            yield group
            group, weight = [], 0
        group.append(row)
        weight += _weight(row)
    if group:
        yield group


def _weight(row: Row) -> int:
    """Bytes of the image and, if there is one, the mask."""
    return sum(len(value) for value in row if isinstance(value, bytes))


def digest(image: bytes) -> int:
    """The first 8 bytes of the sha256, big-endian."""
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "big")


def annotations_of(file: Path) -> tuple[str, ...]:
    """The columns of annotations that a shard has, sorted."""
    return columns_in(pq.read_schema(file).names)


def read_rows(file: Path) -> Iterator[Row]:
    names = ["image", "label", "path", *annotations_of(file)]
    with parquet_file(file) as opened:
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, columns=names, use_threads=False)
            yield from zip(*(table.column(name).to_pylist() for name in names), strict=True)

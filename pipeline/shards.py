"""Shards of the store, one Parquet file each: written whole or not at all."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.durable import put_in_place, temporary_in
from pipeline.store import GROUP_BYTES, ROW_GROUP, SCHEMA, Shard, file_sha256

# The images are compressed already; statistics and a dictionary of them would only copy them
LAYOUT: dict[str, Any] = {
    "compression": {"id": "zstd", "image": "none", "label": "zstd", "path": "zstd", "digest": "none"},
    "use_dictionary": False,
    "write_statistics": ["id", "label"],
    "write_page_checksum": True,
}

Row = tuple[bytes, int, str]  # encoded image, label, path


def write_shard(folder: Path, shard: Shard, rows: Iterable[Row]) -> Shard | None:
    """Write `rows` with the ids from shard.first_id on under shard.file, whole or not at all; None if there are no rows."""
    temporary = temporary_in(folder)
    groups: list[int] = []
    try:
        with pq.ParquetWriter(temporary, SCHEMA, **LAYOUT) as writer:
            for group in _groups(rows):
                images, labels, paths = zip(*group, strict=True)
                ids = np.arange(len(group), dtype=np.int64) + shard.first_id + sum(groups)
                digests = np.array([digest(image) for image in images], np.uint64)
                writer.write_table(pa.table([ids, pa.array(images, pa.binary()), labels, paths, digests], schema=SCHEMA))
                groups.append(len(group))
        if not groups:
            return None
        size, sha256 = temporary.stat().st_size, file_sha256(temporary)
        put_in_place(temporary, folder / shard.file)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(shard, count=sum(groups), row_groups=tuple(groups), bytes=size, sha256=sha256)


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Row groups of ROW_GROUP images, or of fewer where these would be more than GROUP_BYTES: a group is read as a whole."""
    group: list[Row] = []
    weight = 0
    for row in rows:
        if group and (len(group) == ROW_GROUP or weight + len(row[0]) > GROUP_BYTES):
            yield group
            group, weight = [], 0
        group.append(row)
        weight += len(row[0])
    if group:
        yield group


def digest(image: bytes) -> int:
    """The first 8 bytes of the sha256, big-endian."""
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "big")


def read_rows(file: Path) -> Iterator[Row]:
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, columns=["image", "label", "path"], use_threads=False)
            yield from zip(*(column.to_pylist() for column in table.columns), strict=True)

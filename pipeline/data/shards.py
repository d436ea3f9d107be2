"""Writes the shards of a store, one Parquet file each: a shard is whole or does not exist."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.annotations import BOX_TYPE, select_annotation_columns
from firstlight.pipeline.data.manifest import MAX_GROUP_BYTES, ROWS_PER_GROUP, Shard, file_sha256, shard_schema
from firstlight.pipeline.data.parquet import make_numbers, make_texts, open_parquet_file
from firstlight.pipeline.files import atomic_path

# The images are compressed already; statistics and a dictionary of them would only copy them.
SHARD_LAYOUT: dict[str, Any] = {
    "compression": {"id": "zstd", "image": "none", "label": "zstd", "path": "zstd", "digest": "none"},
    "use_dictionary": False,
    "write_statistics": ["id", "label"],
    "write_page_checksum": True,
}

# Encoded image (bytes), label (int), path (str), `short_digest` of the image in the source (int), and the values of the
# columns of annotations.
ShardRow = tuple[Any, ...]


def write_shard(folder: Path, shard: Shard, rows: Iterable[ShardRow], annotations: Sequence[str] = ()) -> Shard | None:
    """Writes `rows` to the file `shard.file`, with ids from `shard.first_id` on; atomic.

    `annotations`: the columns of `ANNOTATION_COLUMNS` that the rows have. Returns `shard` with the facts of the file,
    or None if there are no rows.
    """
    schema = shard_schema(annotations)
    groups = _group_rows(rows)
    first = next(groups, None)
    if first is None:
        return None
    counts: list[int] = []
    with atomic_path(folder / shard.file) as temporary:
        with pq.ParquetWriter(temporary, schema, **_writer_options(schema)) as writer:
            for group in itertools.chain([first], groups):
                writer.write_table(_build_table(group, shard.first_id + sum(counts), schema, annotations))
                counts.append(len(group))
        size, sha256 = temporary.stat().st_size, file_sha256(temporary)
    return replace(shard, count=sum(counts), row_groups=tuple(counts), bytes=size, sha256=sha256)


def _build_table(group: list[ShardRow], first_id: int, schema: pa.Schema, annotations: Sequence[str]) -> pa.Table:
    images, labels, paths, digests, *rest = zip(*group, strict=True)
    plain = [
        make_numbers(range(first_id, first_id + len(group)), np.int64),
        make_texts(images, pa.binary()),
        make_numbers(labels, np.int64),
        make_texts([path.encode() for path in paths], pa.string()),
        make_numbers(digests, np.uint64),
    ]
    columns = [pa.array(values, schema.field(name).type) for name, values in zip(annotations, rest, strict=True)]
    return pa.table([*plain, *columns], schema=schema)


def _writer_options(schema: pa.Schema) -> dict[str, Any]:
    """Returns SHARD_LAYOUT with annotations compressed, except masks, which are PNG."""
    known = select_annotation_columns(schema.names)
    leaves = {
        "boxes": [f"boxes.list.element.{side.name}" for side in BOX_TYPE],
        "mask": ["mask"],
        "present": ["present.list.element"],
    }
    extra = {leaf: "none" if name == "mask" else "zstd" for name in known for leaf in leaves[name]}
    return {**SHARD_LAYOUT, "compression": {**SHARD_LAYOUT["compression"], **extra}}


def _group_rows(rows: Iterable[ShardRow]) -> Iterator[list[ShardRow]]:
    """Yields groups of ROWS_PER_GROUP rows, or of fewer if these would exceed MAX_GROUP_BYTES.

    A row group is read as a whole.
    """
    group: list[ShardRow] = []
    num_bytes = 0
    for row in rows:
        if group and (len(group) == ROWS_PER_GROUP or num_bytes + _count_row_bytes(row) > MAX_GROUP_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(row)
        num_bytes += _count_row_bytes(row)
    if group:
        yield group


def _count_row_bytes(row: ShardRow) -> int:
    """Returns the number of bytes of the image and, if there is one, of the mask."""
    return sum(len(value) for value in row if isinstance(value, bytes))


def short_digest(image: bytes) -> int:
    """Returns the first 8 bytes of the sha256 as a big-endian number."""
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "big")


def read_annotation_columns(file: Path) -> tuple[str, ...]:
    """Returns the columns of annotations that a shard has, sorted."""
    return select_annotation_columns(pq.read_schema(file).names)


def read_shard_rows(file: Path) -> Iterator[ShardRow]:
    """Yields the rows of a shard, one row group in memory at a time."""
    names = ["image", "label", "path", "digest", *read_annotation_columns(file)]
    with open_parquet_file(file) as opened:
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, columns=names, use_threads=False)
            yield from zip(*(table.column(name).to_pylist() for name in names), strict=True)

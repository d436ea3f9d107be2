"""Copies: images whose encoded bytes are those of an earlier one. They are kept, and told of: a test image that is trained on proves nothing.

Encoded bytes and not pixels: the copies that data sets have are of files, and a hash of 64 MB of pixels would cost more than decoding a file.
A picture that was encoded twice is not found.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.parquet import parquet_file
from firstlight.pipeline.data.store import DUPLICATES, Shard
from firstlight.pipeline.files import atomic_path

SCHEMA = pa.schema([("id", pa.int64()), ("first_id", pa.int64()), ("split", pa.string()), ("path", pa.string())])


def write_duplicates(folder: Path, shards: Sequence[Shard]) -> dict[str, int]:
    """List the copies in DUPLICATES, by id; how many there are, and how many of them are test images that are also in train.

    The first of a group is a training image where it has one, so that a test image that is one of them is listed.

    Needs about 60 bytes of memory per image of the store: the digests, and the order of them.
    """
    digests = np.concatenate([_column(folder / shard.file, "digest").to_numpy() for shard in shards])
    test = np.repeat([shard.split != "train" for shard in shards], [shard.count for shard in shards])
    order = np.argsort(test, kind="stable")  # train first, also where the shards of an extended store alternate
    ids, firsts = (order[places] for places in copies(digests[order]))
    by_id = np.argsort(ids)
    ids, firsts = ids[by_id], firsts[by_id]
    with atomic_path(folder / DUPLICATES) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for shard in shards:
            here = slice(*np.searchsorted(ids, [shard.first_id, shard.first_id + shard.count]))
            if here.start < here.stop:
                paths = _column(folder / shard.file, "path").take(pa.array(ids[here] - shard.first_id))
                split = pa.array([shard.split] * len(paths), pa.string())
                writer.write_table(pa.table([ids[here], firsts[here], split, paths], schema=SCHEMA))
    return {"copies": len(ids), "of_train_in_test": int((test[ids] & ~test[firsts]).sum())}


def copies(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) uint64 by id -> ascending ids (k,) of those that an earlier image has too, and the id (k,) of the first that has it."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    first = starts[np.searchsorted(starts, again, side="right") - 1]
    by_id = np.argsort(order[again])
    return order[again][by_id], order[first][by_id]


def _column(file: Path, name: str) -> Any:
    with parquet_file(file) as opened:
        return opened.read(columns=[name], use_threads=False).column(name).combine_chunks()

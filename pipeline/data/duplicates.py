"""Finds duplicates: images with the same encoded bytes as an earlier one. They are kept and reported.

A test image that was trained on proves nothing. Encoded bytes are compared, not pixels: the duplicates of data sets are
copies of files, and a hash of 64 MB of pixels would cost more than decoding a file. An image that was encoded twice is
therefore not found.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.manifest import DUPLICATES_FILE, Shard
from firstlight.pipeline.data.parquet import open_parquet_file
from firstlight.pipeline.files import atomic_path

DUPLICATES_SCHEMA = pa.schema(
    [("id", pa.int64()), ("first_id", pa.int64()), ("split", pa.string()), ("path", pa.string())]
)


def write_duplicates(folder: Path, shards: Sequence[Shard]) -> dict[str, int]:
    """Lists the duplicates by id in DUPLICATES_FILE. Returns their number and that of test images also in train.

    The first image of a group is a training image if the group has one, so that a duplicate in the test split is
    listed. Memory: about 60 bytes per image of the store, for the digests and their order.
    """
    digests = np.concatenate([_read_shard_column(folder / shard.file, "digest").to_numpy() for shard in shards])
    is_test = np.repeat([shard.split != "train" for shard in shards], [shard.count for shard in shards])
    # Training images first, also if the shards of an extended store alternate.
    order = np.argsort(is_test, kind="stable")
    ids, firsts = (order[positions] for positions in find_copies(digests[order]))
    by_id = np.argsort(ids)
    ids, firsts = ids[by_id], firsts[by_id]
    with atomic_path(folder / DUPLICATES_FILE) as temporary, pq.ParquetWriter(temporary, DUPLICATES_SCHEMA) as writer:
        for shard in shards:
            rows = slice(*np.searchsorted(ids, [shard.first_id, shard.first_id + shard.count]))
            if rows.start < rows.stop:
                paths = _read_shard_column(folder / shard.file, "path").take(pa.array(ids[rows] - shard.first_id))
                split = pa.array([shard.split] * len(paths), pa.string())
                writer.write_table(pa.table([ids[rows], firsts[rows], split, paths], schema=DUPLICATES_SCHEMA))
    return {"copies": len(ids), "of_train_in_test": int((is_test[ids] & ~is_test[firsts]).sum())}


def find_copies(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds repeated digests, given (n,) uint64 by id.

    Returns the ascending ids (k,) of images with the digest of an earlier one, and the id (k,) of the first with it.
    """
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    first = starts[np.searchsorted(starts, again, side="right") - 1]
    by_id = np.argsort(order[again])
    return order[again][by_id], order[first][by_id]


def _read_shard_column(file: Path, name: str) -> Any:
    with open_parquet_file(file) as opened:
        return opened.read(columns=[name], use_threads=False).column(name).combine_chunks()

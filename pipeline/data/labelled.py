"""Lists the images whose labels a training used, as a table for MLflow, so that others can repeat the training."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS, Shard
from firstlight.pipeline.data.parquet import open_parquet_file
from firstlight.pipeline.data.row_groups import damaged_shard_error
from firstlight.pipeline.data.store import Store

# Columns id, label, class, path.
LABELLED_FILE = "labelled.parquet"


def write_labelled(store: Store, ids: np.ndarray, folder: Path) -> Path:
    """Writes LABELLED_FILE into `folder`, with a row for each of the sorted `ids`. Images are not read.

    Raises:
        UserError: a shard is damaged.
    """
    parts = [
        _read_labelled_rows(store, shard, part)
        for shard in store.shards
        if len(part := _select_within(ids, shard.first_id, shard.count))
    ]
    table = pa.concat_tables(parts)
    labels = table.column("label").to_pylist()
    names = pa.array([store.classes[label] if label >= 0 else None for label in labels], pa.string())
    table = table.append_column("class", names).select(["id", "label", "class", "path"])
    pq.write_table(table, folder / LABELLED_FILE, compression="zstd")
    return folder / LABELLED_FILE


def _select_within(ids: np.ndarray, first: int, count: int) -> np.ndarray:
    start, stop = np.searchsorted(ids, (first, first + count))
    return ids[start:stop]


def _read_labelled_rows(store: Store, shard: Shard, ids: np.ndarray) -> pa.Table:
    try:
        with open_parquet_file(store.path / shard.file) as file:
            table = file.read(columns=["id", "label", "path"], use_threads=False)
    except DAMAGE_ERRORS as error:
        raise damaged_shard_error(store.path, shard, error) from None
    return table.filter(pc.is_in(table.column("id"), pa.array(ids)))

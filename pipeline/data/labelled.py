"""Which images a training saw the labels of, as a table for MLflow: others can repeat it, and see what is behind a number."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from firstlight.pipeline.data.parquet import parquet_file
from firstlight.pipeline.data.store import DAMAGE, Store, repair
from firstlight.pipeline.errors import UserError

LABELLED = "labelled.parquet"  # id, label, class, path


def write_labelled(store: Store, ids: np.ndarray, folder: Path) -> Path:
    """`labelled.parquet` in `folder`: a row for each of the sorted `ids`. Reads no image.

    Raises:
        UserError: a shard is damaged.
    """
    table = pa.concat_tables(
        [
            _rows(store, shard.file, part)
            for shard in store.shards
            if len(part := _within(ids, shard.first_id, shard.count))
        ]
    )
    names = pa.array(
        [store.classes[label] if label >= 0 else None for label in table.column("label").to_pylist()], pa.string()
    )
    pq.write_table(
        table.append_column("class", names).select(["id", "label", "class", "path"]),
        folder / LABELLED,
        compression="zstd",
    )
    return folder / LABELLED


def _within(ids: np.ndarray, first: int, count: int) -> np.ndarray:
    start, stop = np.searchsorted(ids, (first, first + count))
    return ids[start:stop]


def _rows(store: Store, file: str, ids: np.ndarray) -> pa.Table:
    try:
        with parquet_file(store.path / file) as shard:
            table = shard.read(columns=["id", "label", "path"], use_threads=False)
    except DAMAGE as error:
        raise UserError(
            f"{store.path / file}: is damaged: {' '.join(str(error).split())[:200]}; {repair(store.path)}"
        ) from None
    return table.filter(pc.is_in(table.column("id"), pa.array(ids)))

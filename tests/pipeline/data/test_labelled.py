from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.labelled import write_labelled
from firstlight.pipeline.data.manifest import SHARD_SCHEMA, Shard
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError


def store(folder: Path) -> Store:
    """Ids 0..4 in one shard and 5..8 in another; label 1 for odd ids, unknown for id 6."""
    shards, first = [], 0
    for name, count in (("train-00000.parquet", 5), ("train-00001.parquet", 4)):
        ids = np.arange(first, first + count)
        labels = np.where(ids == 6, -1, ids % 2)
        paths = [f"photos/{i}.png" for i in ids]
        table = {"id": ids, "image": [b"x"] * count, "label": labels, "path": paths, "digest": ids.astype(np.uint64)}
        pq.write_table(
            pa.table(table, schema=pa.schema([SHARD_SCHEMA.field(name) for name in table])),
            folder / name,
            write_page_checksum=True,
        )
        shards.append(Shard(name, "train", first, count, (count,), (folder / name).stat().st_size, ""))
        first += count
    return Store(
        path=folder,
        classes=("even", "odd"),
        splits={},
        shards=tuple(shards),
        extends=(),
        quarantined=0,
        hash="hash",
        source={},
        images={},
    )


def test_table_has_a_row_per_requested_image(tmp_path: Path) -> None:
    file = write_labelled(store(tmp_path), np.array([1, 4, 6, 7]), tmp_path)
    assert pq.read_table(file).to_pydict() == {
        "id": [1, 4, 6, 7],
        "label": [1, 0, -1, 1],
        "class": ["odd", "even", None, "odd"],
        "path": ["photos/1.png", "photos/4.png", "photos/6.png", "photos/7.png"],
    }


def test_shards_without_requested_image_are_not_read(tmp_path: Path) -> None:
    its = store(tmp_path)
    (tmp_path / "train-00001.parquet").unlink()
    assert pq.read_table(write_labelled(its, np.array([0, 3]), tmp_path)).column("id").to_pylist() == [0, 3]


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    its = store(tmp_path)
    (tmp_path / "train-00001.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"train-00001\.parquet: is missing or damaged: .*; delete the folder"):
        write_labelled(its, np.array([0, 8]), tmp_path)

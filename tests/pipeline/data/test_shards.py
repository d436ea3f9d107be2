"""The Parquet layout of a shard."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data import shards
from firstlight.pipeline.data.manifest import ROWS_PER_GROUP, Shard
from firstlight.pipeline.data.shards import read_shard_rows, write_shard
from firstlight.pipeline.data.store import Store

pytestmark = pytest.mark.usefixtures("own_cache")


def test_shard_columns_are_compressed_except_images(text_store: Store) -> None:
    facts = pq.read_metadata(text_store.path / "train-00000.parquet")
    columns = [facts.row_group(0).column(k) for k in range(4)]
    assert [column.path_in_schema for column in columns] == ["id", "image", "label", "path"]
    assert [column.compression for column in columns] == ["ZSTD", "UNCOMPRESSED", "ZSTD", "ZSTD"]
    assert columns[1].statistics is None  # it would repeat whole images in the footer
    assert facts.row_group(0).num_rows == ROWS_PER_GROUP


def test_row_group_is_cut_at_the_limit_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_GROUP_BYTES", 10)
    rows = [(b"x" * count, 0, "p", 2**64 - count) for count in (4, 6, 1, 20, 3)]
    written = write_shard(tmp_path, Shard("train-00000.parquet", "train", 7, 0, (), 0, ""), rows)
    assert written is not None
    assert written.row_groups == (2, 1, 1, 1)
    assert list(read_shard_rows(tmp_path / written.file)) == rows
    assert pq.read_table(tmp_path / written.file)["id"].to_pylist() == [7, 8, 9, 10, 11]


def test_no_rows_leave_no_file(tmp_path: Path) -> None:
    assert write_shard(tmp_path, Shard("train-00000.parquet", "train", 0, 0, (), 0, ""), []) is None
    assert not list(tmp_path.iterdir())

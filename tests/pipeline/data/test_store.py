"""Reading back what was written, by id, split and row group."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data import row_groups
from firstlight.pipeline.data import store as store_module
from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.row_groups import RowGroupCache
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from tests.support import recipes
from tests.support.buckets import make_mirror, open_elsewhere
from tests.support.text_store import TEST_COUNT, TRAIN_COUNT, assert_store_refused, image_content, image_label

pytestmark = pytest.mark.usefixtures("own_cache")


def test_opened_store_has_splits_and_row_groups_of_the_manifest(text_store: Store) -> None:
    assert (text_store.classes, text_store.quarantined) == (("a", "b", "c"), 2)
    assert text_store.splits == {"train": 300, "test": 140}
    assert text_store.ids("train").tolist() == list(range(300))
    assert text_store.ids("test").tolist() == list(range(300, 440))
    assert text_store.ids("val").tolist() == []
    assert [shard.row_groups for shard in text_store.shards] == [(128, 72), (100,), (128, 12)]
    seen: list[tuple[int, int]] = []
    text_store.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(200, 440), (300, 440), (440, 440)]


def test_labels_are_read_by_split_and_as_a_whole(text_store: Store) -> None:
    assert text_store.labels("train").tolist() == [image_label(i) for i in range(TRAIN_COUNT)]
    assert text_store.labels("test").tolist() == [image_label(i) for i in range(TRAIN_COUNT, TRAIN_COUNT + TEST_COUNT)]
    assert text_store.labels().tolist() == [image_label(i) for i in range(TRAIN_COUNT + TEST_COUNT)]


def test_row_groups_are_listed_in_id_order(text_store: Store) -> None:
    assert text_store.list_row_groups("train").tolist() == [[0, 0, 0], [0, 1, 128], [1, 0, 200]]
    assert text_store.list_row_groups("test").tolist() == [[2, 0, 300], [2, 1, 428]]
    for shard, group, first in np.concatenate(
        [text_store.list_row_groups("train"), text_store.list_row_groups("test")]
    ).tolist():
        ids, images, labels = text_store.read_group(shard, group)
        assert ids.tolist() == list(range(first, first + len(ids)))
        assert images == [image_content(i) for i in ids.tolist()]
        assert labels.tolist() == [image_label(i) for i in ids.tolist()]


def test_read_returns_rows_in_requested_order(text_store: Store) -> None:
    ids = np.random.default_rng(0).permutation(TRAIN_COUNT + TEST_COUNT)
    ids = np.concatenate([ids, ids[:5]])  # an id may be asked for twice
    images, labels = text_store.read(ids)
    assert images == [image_content(i) for i in ids.tolist()]
    assert labels.tolist() == [image_label(i) for i in ids.tolist()]
    nothing, none = text_store.read(np.empty(0, np.int64))
    assert (nothing, none.tolist()) == ([], [])


def test_read_touches_each_row_group_once(text_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(store_module, "image_cache", RowGroupCache(0))
    read = row_groups.read_row_group
    monkeypatch.setattr(
        row_groups,
        "read_row_group",
        lambda folder, shard, group: loads.append((shard.file, group)) or read(folder, shard, group),
    )
    text_store.read(np.random.default_rng(0).permutation(TRAIN_COUNT + TEST_COUNT))
    assert sorted(loads) == sorted({*loads})
    assert len(loads) == 5


@pytest.mark.fault(36, "an id outside of a store")
@pytest.mark.parametrize("wrong", [-1, TRAIN_COUNT + TEST_COUNT, 10**12])
def test_id_out_of_range_is_named(text_store: Store, wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"id {wrong} .*0\.\.439"):
        text_store.read(np.array([3, wrong]))


def test_store_pickles_small_and_reads_after_unpickling(text_store: Store) -> None:
    text_store.read(np.arange(TRAIN_COUNT))
    data = pickle.dumps(text_store)
    assert len(data) < 5_000
    assert pickle.loads(data).read(np.array([7]))[0] == [image_content(7)]


def test_missing_files_are_named(store_copy: Store) -> None:
    (store_copy.path / "test-00000.parquet").unlink()
    assert_store_refused(store_copy, "test-00000.parquet", "No such file")
    (store_copy.path / MANIFEST_FILE).unlink()
    assert_store_refused(store_copy, MANIFEST_FILE, "No such file")


@pytest.mark.parametrize("length", [0, 1, 100, -100, -1])
def test_truncated_shard_is_refused(store_copy: Store, length: int) -> None:
    file = store_copy.path / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:length])
    assert_store_refused(store_copy, file.name, "bytes")
    with pytest.raises(UserError, match=r"train-00001\.parquet.*bytes"):
        store_copy.verify()


def test_store_in_a_bucket_is_read_on_a_machine_that_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_mirror(tmp_path / "here", "stored", monkeypatch)
    dataset = recipes.recipe(tmp_path).dataset
    store = prepare(dataset, here.root / "stores", lambda: False, lambda done, total: None)
    assert store.location == f"memory://stored/runs/stores/{store.path.name}"
    here.push(store.path)
    sent, ids = pickle.dumps(store), store.ids("test")[:5]
    there = open_elsewhere(tmp_path / "there", "stored", monkeypatch)
    moved = pickle.loads(sent)
    assert moved.path == there.root / "stores" / store.path.name
    images, labels = moved.read(ids)
    assert images == store.read(ids)[0]
    assert labels.tolist() == store.labels("test")[:5].tolist()
    assert sorted(file.name for file in moved.path.iterdir()) == ["test-00000.parquet"], "only what was read"
    again = prepare(dataset, there.root / "stores", lambda: pytest.fail("is prepared"), lambda done, total: None)
    assert again.hash == store.hash, "the rest is downloaded"
    # A shard that is damaged in the bucket is an error that names the object.
    (shard,) = (shard for shard in store.shards if shard.split == "train")
    here.bucket.write(f"stores/{store.path.name}/{shard.file}", b"x" * shard.bytes)
    (moved.path / shard.file).unlink()
    with pytest.raises(
        UserError, match=rf"is missing or damaged: DamagedRecord: memory://stored/runs/stores/.*/{shard.file}: is"
    ):
        moved.labels("train")

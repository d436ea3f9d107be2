"""Reading back what was written, and every kind of damage as an error that names the file."""

import json
import pickle
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data import row_groups
from firstlight.pipeline.data import store as module
from firstlight.pipeline.data.manifest import MANIFEST_FILE, ROWS_PER_GROUP, Shard, manifest_hash
from firstlight.pipeline.data.row_groups import RowGroupCache
from firstlight.pipeline.data.shards import write_shard
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

TRAIN, TEST = 300, 140


def content(image_id: int) -> bytes:
    return f"image {image_id} ".encode() * (image_id % 5 + 1)


def write(folder: Path) -> Store:
    """Two shards of training images (200 + 100), one of test images; label = id % 3, -1 for every tenth."""
    folder.mkdir(parents=True)
    shards = []
    for file, split, first, count in (
        ("train-00000", "train", 0, 200),
        ("train-00001", "train", 200, 100),
        ("test-00000", "test", 300, 140),
    ):
        rows = [(content(i), label(i), f"{i}.png") for i in range(first, first + count)]
        shards.append(write_shard(folder, Shard(f"{file}.parquet", split, first, 0, (), 0, ""), rows))
    raw = {
        "format": 3,
        "source": {"kind": "folder", "root": "/somewhere", "fingerprint": "f"},
        "classes": ["a", "b", "c"],
        "splits": {"train": TRAIN, "test": TEST},
        "extends": [],
        "shards": [asdict(shard) for shard in shards if shard],
        "quarantined": 2,
    }
    save(folder, raw)
    return Store.open(folder)


def save(folder: Path, raw: dict) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps({**raw, "hash": manifest_hash(raw)}))


def manifest(store: Store) -> dict:
    return json.loads((store.path / MANIFEST_FILE).read_text())


def label(image_id: int) -> int:
    return -1 if image_id % 10 == 0 else image_id % 3


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "image_cache", RowGroupCache(10**6))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("store") / "whole")


@pytest.fixture
def store(whole: Store, tmp_path: Path) -> Store:
    """A copy to damage."""
    shutil.copytree(whole.path, tmp_path / "copy")
    return Store.open(tmp_path / "copy")


def test_the_manifest_is_read_back(whole: Store) -> None:
    assert (whole.classes, whole.quarantined) == (("a", "b", "c"), 2)
    assert whole.splits == {"train": 300, "test": 140}
    assert whole.ids("train").tolist() == list(range(300))
    assert whole.ids("test").tolist() == list(range(300, 440))
    assert whole.ids("val").tolist() == []
    assert [shard.row_groups for shard in whole.shards] == [(128, 72), (100,), (128, 12)]
    seen: list[tuple[int, int]] = []
    whole.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(200, 440), (300, 440), (440, 440)]


def test_labels(whole: Store) -> None:
    assert whole.labels("train").tolist() == [label(i) for i in range(TRAIN)]
    assert whole.labels("test").tolist() == [label(i) for i in range(TRAIN, TRAIN + TEST)]
    assert whole.labels().tolist() == [label(i) for i in range(TRAIN + TEST)]


def test_groups_are_the_row_groups_in_id_order(whole: Store) -> None:
    assert whole.list_row_groups("train").tolist() == [[0, 0, 0], [0, 1, 128], [1, 0, 200]]
    assert whole.list_row_groups("test").tolist() == [[2, 0, 300], [2, 1, 428]]
    for shard, group, first in np.concatenate([whole.list_row_groups("train"), whole.list_row_groups("test")]).tolist():
        ids, images, labels = whole.read_group(shard, group)
        assert ids.tolist() == list(range(first, first + len(ids)))
        assert images == [content(i) for i in ids.tolist()]
        assert labels.tolist() == [label(i) for i in ids.tolist()]


def test_read_gives_the_rows_in_the_order_asked(whole: Store) -> None:
    ids = np.random.default_rng(0).permutation(TRAIN + TEST)
    ids = np.concatenate([ids, ids[:5]])  # an id may be asked for twice
    images, labels = whole.read(ids)
    assert images == [content(i) for i in ids.tolist()]
    assert labels.tolist() == [label(i) for i in ids.tolist()]
    nothing, none = whole.read(np.empty(0, np.int64))
    assert (nothing, none.tolist()) == ([], [])


def test_read_touches_each_row_group_once(whole: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(module, "image_cache", RowGroupCache(0))
    read = row_groups.read_row_group
    monkeypatch.setattr(
        row_groups,
        "read_row_group",
        lambda folder, shard, group: loads.append((shard.file, group)) or read(folder, shard, group),
    )
    whole.read(np.random.default_rng(0).permutation(TRAIN + TEST))
    assert sorted(loads) == sorted({*loads})
    assert len(loads) == 5


@pytest.mark.fault(36, "an id outside of a store")
@pytest.mark.parametrize("wrong", [-1, TRAIN + TEST, 10**12])
def test_an_id_out_of_range_is_named(whole: Store, wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"id {wrong} .*0\.\.439"):
        whole.read(np.array([3, wrong]))


def test_the_cache_is_bounded_and_keeps_the_last(whole: Store) -> None:
    groups = [whole.read_group(0, 0), whole.read_group(0, 1), whole.read_group(1, 0)]
    weights = [row_groups._count_cached_bytes(group) for group in groups]
    cache = RowGroupCache(weights[0] + weights[1])
    cache.put(("a",), groups[0])
    cache.put(("b",), groups[1])
    assert cache.get(("a",)) is groups[0]  # now used last
    cache.put(("c",), groups[2])
    assert cache.get(("b",)) is None
    assert cache._size == sum(row_groups._count_cached_bytes(group) for group in cache._groups.values())
    assert cache._size <= weights[0] + weights[1]


def test_pickles_small_and_reads_on(whole: Store) -> None:
    whole.read(np.arange(TRAIN))
    data = pickle.dumps(whole)
    assert len(data) < 5_000
    assert pickle.loads(data).read(np.array([7]))[0] == [content(7)]


def test_the_layout_of_a_shard(whole: Store) -> None:
    facts = pq.read_metadata(whole.path / "train-00000.parquet")
    columns = [facts.row_group(0).column(k) for k in range(4)]
    assert [column.path_in_schema for column in columns] == ["id", "image", "label", "path"]
    assert [column.compression for column in columns] == ["ZSTD", "UNCOMPRESSED", "ZSTD", "ZSTD"]
    assert columns[1].statistics is None  # it would repeat whole images in the footer
    assert facts.row_group(0).num_rows == ROWS_PER_GROUP


def test_where_the_source_lay_is_not_in_the_hash(store: Store) -> None:
    raw = manifest(store)
    moved = {**raw, "source": {**raw["source"], "root": "/elsewhere"}}
    assert manifest_hash(moved) == raw["hash"]
    assert manifest_hash({**raw, "classes": ["a", "b", "d"]}) != raw["hash"]
    assert manifest_hash({**raw, "source": {**raw["source"], "fingerprint": "g"}}) != raw["hash"]


def assert_refused(store: Store, file: str, what: str = "") -> None:
    """Opening or reading everything ends in an error that names the file and the repair."""
    pattern = (
        re.escape(str(store.path / file)) + f".*{what}.*" + re.escape(f"delete the folder {store.path} and run again")
    )
    with pytest.raises(UserError, match=pattern) as raised:
        read_all(store.path)
    assert "\n" not in str(raised.value)


def read_all(path: Path) -> tuple[list[bytes], list[int]]:
    module.image_cache = RowGroupCache(0)
    store = Store.open(path)
    images, labels = store.read(np.arange(TRAIN + TEST))
    assert labels.tolist() == [*store.labels("train").tolist(), *store.labels("test").tolist()]
    return images, labels.tolist()


def test_missing_files(store: Store) -> None:
    (store.path / "test-00000.parquet").unlink()
    assert_refused(store, "test-00000.parquet", "No such file")
    (store.path / MANIFEST_FILE).unlink()
    assert_refused(store, MANIFEST_FILE, "No such file")


@pytest.mark.parametrize("length", [0, 1, 100, -100, -1])
def test_truncated_shard(store: Store, length: int) -> None:
    file = store.path / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:length])
    assert_refused(store, file.name, "bytes")
    with pytest.raises(UserError, match=r"train-00001\.parquet.*bytes"):
        store.verify()


def test_shard_truncated_after_opening(store: Store) -> None:
    file = store.path / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    module.image_cache = RowGroupCache(0)
    with pytest.raises(UserError, match=r"train-00001\.parquet.*delete the folder"):
        store.read(np.array([250]))
    with pytest.raises(UserError, match=r"train-00001\.parquet.*delete the folder"):
        store.labels("train")


@pytest.mark.fault(18, "bits of a store")
def test_flipped_bits_are_noticed_or_harmless(store: Store) -> None:
    file = store.path / "train-00000.parquet"
    data, random, seen = file.read_bytes(), np.random.default_rng(0), 0
    expected = read_all(store.path)
    for place in random.integers(0, len(data), 150).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=r"train-00000\.parquet.*sha256"):
            store.verify()
        try:
            assert read_all(store.path) == expected
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017 - most flips are errors, not all
            seen += 1
    assert seen > 75


def test_shard_of_another_place(store: Store) -> None:
    """A whole file with a good checksum, but of other ids."""
    file = store.path / "train-00000.parquet"
    rows = [(content(i), 0, "x") for i in range(200)]
    other = write_shard(store.path, Shard(file.name, "train", 1, 0, (), 0, ""), rows)
    raw = manifest(store)
    raw["shards"][0].update(bytes=other.bytes, sha256=other.sha256)
    save(store.path, raw)
    assert_refused(store, file.name, "ids of the manifest")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": None},
        {"shards": 3},
        {"shards": [{"file": "x"}]},
        {"splits": []},
        {"splits": {"train": 299, "test": 140}},
        {"splits": {"train": {"first_id": 0, "count": 300}, "test": {"first_id": 300, "count": 140}}},
        {"extends": None},
        {"extends": [{"name": "a", "hash": "h", "ids": 441}]},
        {"extends": [{"name": "a", "hash": "h", "ids": 300}, {"name": "b", "hash": "i", "ids": 200}]},
        {"classes": None},
        {"quarantined": "many"},
    ],
)
def test_manifest_of_another_shape(store: Store, change: dict) -> None:
    save(store.path, {**manifest(store), **change})
    assert_refused(store, MANIFEST_FILE, "is not a manifest of format 3")


@pytest.mark.fault(54, "a shard's name that leads out of its folder")
@pytest.mark.parametrize("name", ["../train-00000.parquet", "/etc/passwd", "a/train-00000.parquet", ""])
def test_a_shard_name_cannot_lead_out_of_the_folder(store: Store, name: str) -> None:
    raw = manifest(store)
    raw["shards"][0]["file"] = name
    save(store.path, raw)
    assert_refused(store, MANIFEST_FILE, "does not follow")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 3}', "\udcff", "[" * 100_000])
def test_manifest_that_is_none(store: Store, text: str) -> None:
    (store.path / MANIFEST_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(store, MANIFEST_FILE, "is not a manifest")


def test_manifest_changed_by_hand(store: Store) -> None:
    file = store.path / MANIFEST_FILE
    file.write_text(file.read_text().replace('"quarantined": 2', '"quarantined": 0'))
    assert_refused(store, MANIFEST_FILE, "hash")

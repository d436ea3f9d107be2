"""A store with annotations: read by id, apart from images, damaged, renumbered, and continued after a stop."""

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data import shards
from firstlight.pipeline.data import store as module
from firstlight.pipeline.data.prepare import prepare as prepare_module
from firstlight.pipeline.data.row_groups import RowGroupCache
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import make_png
from tests.support.stopped_prepare import Stop, contents
from tests.support.voc_folders import CAT, DOG, HARD_DOG, prepare_voc_store, write_objects

COUNT, CUT = 23, (1, 8)
KINDS = ((CAT,), (DOG, HARD_DOG), (), (CAT, CAT, DOG))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "IMAGES_PER_SHARD", 6)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)
    for name in ("image_cache", "annotation_cache"):
        monkeypatch.setattr(module, name, RowGroupCache(10**6))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Writes 23 images of 8 x 8, two truncated, the last four for testing. Image k has the objects of KINDS[k % 4]."""
    for k in range(COUNT):
        annotate_image(tmp_path / "in", k)
    lists = {
        "trainval": range(COUNT - 4),
        "train": range(10),
        "val": range(10, COUNT - 4),
        "test": range(COUNT - 4, COUNT),
    }
    for name, places in lists.items():
        file = tmp_path / f"in/ImageSets/Main/{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{k:06d}\n" for k in places))
    return tmp_path / "in"


def annotate_image(root: Path, k: int) -> None:
    file = root / f"JPEGImages/{k:06d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(make_png(k)[:50] if k in CUT else make_png(k))
    write_objects(root, k, *KINDS[k % 4])


GOOD = [k for k in range(COUNT) if k not in CUT]


def test_annotations_keep_the_order_of_image_ids(root: Path) -> None:
    found = prepare_voc_store(root)
    assert [shard.first_id for shard in found.shards] == [0, 5, 10, 16, 17]
    ids = np.random.default_rng(0).permutation(len(GOOD))
    ids = np.concatenate([ids, ids[:3]])
    for k, one in zip(ids.tolist(), found.read_annotations(ids), strict=True):
        assert one.box_classes is not None
        assert one.present is not None
        names = [name for name, _, _ in KINDS[GOOD[k] % 4]]
        assert [found.classes[c] for c in one.box_classes.tolist()] == names
        assert one.present.tolist() == [int(name in names) for name in found.classes]
    assert found.read_annotations(np.empty(0, np.int64)) == []
    with pytest.raises(IndexError, match="id 21 is not in the store"):
        found.read_annotations(np.array([21]))
    assert pickle.loads(pickle.dumps(found)).read_annotations(np.array([3]))[0].mask is None


def test_only_needed_columns_are_read_and_each_row_group_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepare_voc_store(root)
    read, seen = pq.ParquetFile.read_row_group, []

    def watched(self: pq.ParquetFile, group: int, columns: list[str], **options: bool) -> object:
        seen.append((*columns,))
        return read(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    groups = sum(len(shard.row_groups) for shard in found.shards)
    found.read(np.arange(len(GOOD)))
    assert seen == [("id", "image", "label")] * groups  # a training does not pay for annotations
    seen.clear()
    for _ in range(2):
        found.read_annotations(np.random.default_rng(1).permutation(len(GOOD)))
    assert seen == [("boxes", "present")] * groups  # nor annotations for images; the second time they are cached


def test_missing_annotations_are_refused(root: Path) -> None:
    plain, boxes = prepare_voc_store(root, annotations=[]), prepare_voc_store(root, annotations=["boxes"])
    with pytest.raises(UserError, match="has no annotations; valid: a store of a source with annotations"):
        plain.read_annotations(np.array([0]))
    assert all(one.present is None for one in boxes.read_annotations(boxes.ids("train")))
    images = [
        pq.read_table(found.path / found.shards[0].file, columns=["image"]).column(0).to_pylist()
        for found in (plain, boxes)
    ]
    assert images[0] == images[1]


def test_damaged_annotations_name_the_shard(root: Path) -> None:
    found = prepare_voc_store(root)
    file = found.path / found.shards[1].file
    whole, random, seen = file.read_bytes(), np.random.default_rng(0), 0
    expected = [one.boxes.tolist() for one in found.read_annotations(np.arange(len(GOOD))) if one.boxes is not None]
    for place in random.integers(0, len(whole), 150).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        module.annotation_cache._groups.clear()
        try:
            found.read_annotations(np.arange(len(GOOD)))
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017 - not every flip is in what is read
            seen += 1
    assert seen > 30
    file.write_bytes(whole)
    module.annotation_cache._groups.clear()
    assert [
        one.boxes.tolist() for one in found.read_annotations(np.arange(len(GOOD))) if one.boxes is not None
    ] == expected


def test_manifest_with_other_columns_is_refused(root: Path) -> None:
    found = dataclasses.replace(prepare_voc_store(root), annotations=("mask",))
    with pytest.raises(UserError, match=r"train-00000\.parquet: is missing or damaged"):
        found.read_annotations(np.array([0]))


def test_stopped_prepare_ends_in_the_same_bytes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its every file, among them those that are numbered again."""
    clean = prepare_voc_store(root)
    replace, after = os.replace, 0

    def stopping(*paths: str) -> None:
        nonlocal after
        replace(*paths)
        after -= 1
        if after == 0:
            raise Stop

    moves = 2 * 5 + 1 + 2 * 4 + 3  # shards and records, bad, those numbered again, duplicates, subsets, manifest
    expected = contents(clean)
    for k in range(1, moves + 1):
        after = k
        for file in clean.path.iterdir():
            file.unlink()
        monkeypatch.setattr(os, "replace", stopping)
        with pytest.raises(Stop):
            prepare_voc_store(root)
        monkeypatch.setattr(os, "replace", replace)
        assert contents(prepare_voc_store(root)) == expected

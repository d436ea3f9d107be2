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
from firstlight.pipeline.errors import UserError
from tests.pipeline.data.prepare.test_jobs import Stop, contents
from tests.pipeline.data.sources.published.test_voc_annotations import CAT, DOG, HARD_DOG, annotate, store
from tests.support.tiny import picture

COUNT, CUT = 23, (1, 8)
KINDS = ((CAT,), (DOG, HARD_DOG), (), (CAT, CAT, DOG))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PART", 6)
    monkeypatch.setattr(shards, "ROW_GROUP", 4)
    for name in ("_cache", "_annotation_cache"):
        monkeypatch.setattr(module, name, module._Cache(10**6))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """23 images of 8 x 8, two of them cut off; image k has the objects of KINDS[k % 4]. The last four are to test on."""
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
    file.write_bytes(picture(k)[:50] if k in CUT else picture(k))
    annotate(root, k, *KINDS[k % 4])


GOOD = [k for k in range(COUNT) if k not in CUT]


def test_annotations_follow_the_numbering(root: Path) -> None:
    found = store(root)
    assert [shard.first_id for shard in found.shards] == [0, 5, 10, 16, 17]
    ids = np.random.default_rng(0).permutation(len(GOOD))
    ids = np.concatenate([ids, ids[:3]])
    for k, one in zip(ids.tolist(), found.annotated(ids), strict=True):
        assert one.box_classes is not None
        assert one.present is not None
        names = [name for name, _, _ in KINDS[GOOD[k] % 4]]
        assert [found.classes[c] for c in one.box_classes.tolist()] == names
        assert one.present.tolist() == [int(name in names) for name in found.classes]
    assert found.annotated(np.empty(0, np.int64)) == []
    with pytest.raises(IndexError, match="id 21 is not in the store"):
        found.annotated(np.array([21]))
    assert pickle.loads(pickle.dumps(found)).annotated(np.array([3]))[0].mask is None


def test_each_side_reads_its_columns_and_each_group_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = store(root)
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
        found.annotated(np.random.default_rng(1).permutation(len(GOOD)))
    assert seen == [("boxes", "present")] * groups  # nor annotations for images; the second time they are cached


def test_what_the_store_does_not_have(root: Path) -> None:
    plain, boxes = store(root, annotations=[]), store(root, annotations=["boxes"])
    with pytest.raises(UserError, match="has no annotations; valid: a store of a source that has some"):
        plain.annotated(np.array([0]))
    with pytest.raises(UserError, match="does not tell which classes occur; it has boxes"):
        boxes.present("train")
    images = [
        pq.read_table(found.path / found.shards[0].file, columns=["image"]).column(0).to_pylist()
        for found in (plain, boxes)
    ]
    assert images[0] == images[1]


def test_damage_names_the_shard(root: Path) -> None:
    found = store(root)
    file = found.path / found.shards[1].file
    whole, random, seen = file.read_bytes(), np.random.default_rng(0), 0
    expected = [one.boxes.tolist() for one in found.annotated(np.arange(len(GOOD))) if one.boxes is not None]
    for place in random.integers(0, len(whole), 150).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        for read in (lambda: found.annotated(np.arange(len(GOOD))), lambda: found.present("train")):
            module._annotation_cache._groups.clear()
            try:
                read()
            except UserError as error:
                assert str(file) in str(error)  # noqa: PT017 - not every flip is in what is read
                seen += 1
    assert seen > 30
    file.write_bytes(whole)
    module._annotation_cache._groups.clear()
    assert [one.boxes.tolist() for one in found.annotated(np.arange(len(GOOD))) if one.boxes is not None] == expected


def test_a_manifest_that_promises_other_columns(root: Path) -> None:
    found = dataclasses.replace(store(root), annotations=("mask",))
    with pytest.raises(UserError, match=r"train-00000\.parquet: is missing or damaged"):
        found.annotated(np.array([0]))


def test_a_prepare_that_was_stopped_ends_in_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its every file, among them those that are numbered again."""
    clean = store(root)
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
            store(root)
        monkeypatch.setattr(os, "replace", replace)
        assert contents(store(root)) == expected

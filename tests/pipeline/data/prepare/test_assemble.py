"""Ids without gaps, the list of bad images, and the ids of subsets."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.data.manifest import MANIFEST_FILE, QUARANTINE_FILE, Shard
from firstlight.pipeline.data.prepare import assemble
from firstlight.pipeline.data.prepare.jobs import PrepareJob
from firstlight.pipeline.errors import UserError
from tests.support.grey_images import dataset, greys, images, local


@pytest.mark.fault(25, "images that are cut off are listed")
@pytest.mark.usefixtures("small_parts")
def test_bad_images_are_listed_and_leave_no_gap_in_ids(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 45, bad=(2, 4, 31))
    (root / "train" / "a" / "000.png").write_bytes(b"")
    store = local(dataset(root=root, max_bad_fraction=0.2), tmp_path / "out")
    listed = pq.read_table(store.path / QUARANTINE_FILE).to_pylist()
    assert [*listed[0]] == ["path", "split", "reason"]  # and no id: ids are of images that can be used
    assert [(row["path"], row["split"]) for row in listed] == [
        (f"train/{p}.png", "train") for p in ("a/000", "a/002", "a/004", "b/031")
    ]
    assert listed[0]["reason"] == "is empty (0 bytes)"
    assert all(row["reason"] for row in listed)
    assert store.quarantined == 4
    assert store.splits == {"train": 41, "test": 6}
    assert store.ids("test").tolist() == list(range(41, 47))
    train = [k for k in [*range(0, 45, 2), *range(1, 45, 2)] if k not in (0, 2, 4, 31)]
    assert greys(store) == [*train, 200, 202, 204, 201, 203, 205]
    assert [row for shard in store.shards for row in shard.row_groups] == [4, 3, 4, 4, 2, 4, 4, 2, 4, 4, 1, 4, 1, 4, 2]
    store.verify()


@pytest.mark.usefixtures("small_parts")
def test_part_without_good_image_has_no_shard(tmp_path: Path) -> None:
    store = local(
        dataset(root=images(tmp_path / "in", 30, bad=tuple(range(0, 20, 2))), max_bad_fraction=0.5), tmp_path / "out"
    )
    assert [shard.file for shard in store.shards] == [
        "train-00001.parquet",
        "train-00002.parquet",
        "test-00000.parquet",
    ]
    assert greys(store)[:2] == [20, 22]


@pytest.mark.fault(32, "no good image")
def test_no_good_training_image_is_refused(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 4, bad=(0, 1, 2, 3))
    with pytest.raises(
        UserError, match=r"4 of 10 images cannot be decoded.*quarantine\.parquet; no image is left for training"
    ):
        local(dataset(root=root, max_bad_fraction=1.0), tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    assert pq.read_table(folder / QUARANTINE_FILE).num_rows == 4
    assert not (folder / MANIFEST_FILE).exists()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 7))
def test_train_ids_number_good_images_in_order(good: list[bool], rows: int) -> None:
    """Whatever is bad and however it is cut in parts, the good ones are numbered in order."""

    listing = SimpleNamespace(subsets={"all": np.arange(len(good))}, splits={"train": len(good)})
    jobs: list[PrepareJob] = [
        {"split": "train", "start": k, "count": len(good[k : k + rows]), "file": f"train-{k:05d}.parquet"}
        for k in range(0, len(good), rows)
    ]
    bad = {
        job["file"]: [k for k, fine in enumerate(good[job["start"] : job["start"] + rows]) if not fine] for job in jobs
    }
    shards, first = [], 0
    for job in jobs:
        count = job["count"] - len(bad[job["file"]])
        if count:
            shards.append(Shard(job["file"], "train", first, count, (count,), 1, ""))
        first += count
    results = [{"job": job, "shard": any(shard.file == job["file"] for shard in shards)} for job in jobs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "read_gaps", lambda folder, job: bad[job["file"]])
        ids = assemble._list_train_ids(listing, results, shards, Path())
    assert ids.tolist() == [sum(good[:k]) if fine else -1 for k, fine in enumerate(good)]

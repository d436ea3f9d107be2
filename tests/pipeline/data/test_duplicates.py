"""Duplicates are found by their bytes in all splits, and listed with the first image that has them."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.duplicates import find_copies
from firstlight.pipeline.data.manifest import DUPLICATES_FILE
from firstlight.pipeline.data.prepare import prepare as module
from tests.support.grey_images import dataset, images, local, png


@pytest.mark.parametrize("kinds", [1, 5, 200, 10**6])
def test_copies_match_the_definition(kinds: int) -> None:
    digests = np.random.default_rng(kinds).integers(0, kinds, 300).astype(np.uint64) * np.uint64(2**44 - 1)
    places = defaultdict(list)
    for image_id, digest in enumerate(digests.tolist()):
        places[digest].append(image_id)
    expected = sorted((image_id, same[0]) for same in places.values() for image_id in same[1:])
    ids, firsts = find_copies(digests)
    assert list(zip(ids.tolist(), firsts.tolist(), strict=True)) == expected


def test_no_copies_among_zero_or_one_image() -> None:
    for digests in (np.empty(0, np.uint64), np.array([7], np.uint64)):
        ids, firsts = find_copies(digests)
        assert (ids.tolist(), firsts.tolist()) == ([], [])


@pytest.mark.fault(35, "copies within and across the splits")
def test_copies_within_and_across_splits_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 4)
    root = images(
        tmp_path / "in", 10, bad=(0,)
    )  # ids follow the paths without the bad one: a/002 is 0, ..., b/001 is 4, ..., test/a/000 is 9
    for copy, of in (
        ("train/b/007.png", 2),
        ("train/b/009.png", 2),
        ("test/a/004.png", 202),
        ("test/b/001.png", 4),
        ("test/b/003.png", 2),
    ):
        (root / copy).write_bytes(png(of))
    (root / "test/b/005.png").write_bytes((root / "train/a/000.png").read_bytes())  # of a bad image: bad itself
    store = local(dataset(root=root, max_bad_fraction=0.5), tmp_path / "out")
    assert store.images["duplicates"] == {"copies": 5, "of_train_in_test": 2}
    assert pq.read_table(store.path / DUPLICATES_FILE).to_pylist() == [
        {"id": 7, "first_id": 0, "split": "train", "path": "train/b/007.png"},
        {"id": 8, "first_id": 0, "split": "train", "path": "train/b/009.png"},
        {"id": 11, "first_id": 10, "split": "test", "path": "test/a/004.png"},
        {"id": 12, "first_id": 1, "split": "test", "path": "test/b/001.png"},
        {"id": 13, "first_id": 0, "split": "test", "path": "test/b/003.png"},
    ]

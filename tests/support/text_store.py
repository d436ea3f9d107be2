"""A store of three shards whose images are short texts, and what reading damaged copies of it ends in."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data import store as store_module
from firstlight.pipeline.data.manifest import MANIFEST_FILE, Shard, manifest_hash
from firstlight.pipeline.data.row_groups import RowGroupCache
from firstlight.pipeline.data.shards import short_digest, write_shard
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

TRAIN_COUNT, TEST_COUNT = 300, 140


def image_content(image_id: int) -> bytes:
    return f"image {image_id} ".encode() * (image_id % 5 + 1)


def image_label(image_id: int) -> int:
    return -1 if image_id % 10 == 0 else image_id % 3


def write_text_store(folder: Path) -> Store:
    """Two shards of training images (200 + 100), one of test images; label = id % 3, -1 for every tenth."""
    folder.mkdir(parents=True)
    shards = []
    for file, split, first, count in (
        ("train-00000", "train", 0, 200),
        ("train-00001", "train", 200, 100),
        ("test-00000", "test", 300, 140),
    ):
        rows = [
            (image_content(i), image_label(i), f"{i}.png", short_digest(image_content(i)))
            for i in range(first, first + count)
        ]
        shards.append(write_shard(folder, Shard(f"{file}.parquet", split, first, 0, (), 0, ""), rows))
    raw = {
        "format": 3,
        "source": {"kind": "folder", "root": "/somewhere", "fingerprint": "f"},
        "classes": ["a", "b", "c"],
        "splits": {"train": TRAIN_COUNT, "test": TEST_COUNT},
        "extends": [],
        "shards": [asdict(shard) for shard in shards if shard],
        "quarantined": 2,
    }
    save_manifest(folder, raw)
    return Store.open(folder)


def save_manifest(folder: Path, raw: dict) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps({**raw, "hash": manifest_hash(raw)}))


def load_manifest(store: Store) -> dict:
    return json.loads((store.path / MANIFEST_FILE).read_text())


def assert_store_refused(store: Store, file: str, what: str = "") -> None:
    """Opening or reading everything ends in an error that names the file and the repair."""
    pattern = (
        re.escape(str(store.path / file)) + f".*{what}.*" + re.escape(f"delete the folder {store.path} and run again")
    )
    with pytest.raises(UserError, match=pattern) as raised:
        read_whole_store(store.path)
    assert "\n" not in str(raised.value)


def read_whole_store(path: Path) -> tuple[list[bytes], list[int]]:
    store_module.image_cache = RowGroupCache(0)
    store = Store.open(path)
    images, labels = store.read(np.arange(TRAIN_COUNT + TEST_COUNT))
    assert labels.tolist() == [*store.labels("train").tolist(), *store.labels("test").tolist()]
    return images, labels.tolist()

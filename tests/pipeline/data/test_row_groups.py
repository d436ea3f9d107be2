"""Row groups are cached within a limit, and damage names the shard."""

import numpy as np
import pytest

from firstlight.pipeline.data import row_groups
from firstlight.pipeline.data import store as store_module
from firstlight.pipeline.data.manifest import Shard
from firstlight.pipeline.data.row_groups import RowGroupCache
from firstlight.pipeline.data.shards import write_shard
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from tests.support.text_store import assert_store_refused, image_content, load_manifest, read_whole_store, save_manifest

pytestmark = pytest.mark.usefixtures("own_cache")


def test_cache_is_bounded_and_keeps_last_used_groups(text_store: Store) -> None:
    groups = [text_store.read_group(0, 0), text_store.read_group(0, 1), text_store.read_group(1, 0)]
    weights = [row_groups._count_cached_bytes(group) for group in groups]
    cache = RowGroupCache(weights[0] + weights[1])
    cache.put(("a",), groups[0])
    cache.put(("b",), groups[1])
    assert cache.get(("a",)) is groups[0]  # now used last
    cache.put(("c",), groups[2])
    assert cache.get(("b",)) is None
    assert cache._size == sum(row_groups._count_cached_bytes(group) for group in cache._groups.values())
    assert cache._size <= weights[0] + weights[1]


def test_shard_truncated_after_opening_is_refused(store_copy: Store) -> None:
    file = store_copy.path / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    store_module.image_cache = RowGroupCache(0)
    with pytest.raises(UserError, match=r"train-00001\.parquet.*delete the folder"):
        store_copy.read(np.array([250]))
    with pytest.raises(UserError, match=r"train-00001\.parquet.*delete the folder"):
        store_copy.labels("train")


@pytest.mark.fault(18, "bits of a store")
def test_flipped_bits_are_detected_or_harmless(store_copy: Store) -> None:
    file = store_copy.path / "train-00000.parquet"
    data, random, seen = file.read_bytes(), np.random.default_rng(0), 0
    expected = read_whole_store(store_copy.path)
    for place in random.integers(0, len(data), 150).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=r"train-00000\.parquet.*sha256"):
            store_copy.verify()
        try:
            assert read_whole_store(store_copy.path) == expected
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017 - most flips are errors, not all
            seen += 1
    assert seen > 75


def test_shard_with_other_ids_is_refused(store_copy: Store) -> None:
    """A whole file with a good checksum, but of other ids."""
    file = store_copy.path / "train-00000.parquet"
    rows = [(image_content(i), 0, "x", i) for i in range(200)]
    other = write_shard(store_copy.path, Shard(file.name, "train", 1, 0, (), 0, ""), rows)
    raw = load_manifest(store_copy)
    raw["shards"][0].update(bytes=other.bytes, sha256=other.sha256)
    save_manifest(store_copy.path, raw)
    assert_store_refused(store_copy, file.name, "ids of the manifest")

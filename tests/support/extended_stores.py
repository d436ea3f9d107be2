"""The checks of every store that extends another."""

import pyarrow.parquet as pq

from firstlight.pipeline.data.store import Store


def rows(store: Store) -> dict[int, tuple[str, str, str, bytes]]:
    """id -> path, split, name of the class, encoded bytes."""
    found = {}
    for shard in store.shards:
        for row in pq.read_table(store.path / shard.file).to_pylist():
            found[row["id"]] = (
                row["path"],
                shard.split,
                "" if row["label"] < 0 else store.classes[row["label"]],
                row["image"],
            )
    return found


def assert_extends(new: Store, old: Store) -> None:
    before, after = rows(old), rows(new)
    assert sorted(after) == list(range(len(after)))
    assert {image_id: after[image_id] for image_id in before} == before
    assert new.classes[: len(old.classes)] == old.classes
    assert new.extends[:-1] == old.extends
    assert (new.extends[-1].hash, new.extends[-1].ids) == (old.hash, len(before))
    assert new.shards[: len(old.shards)] == old.shards
    new.verify()

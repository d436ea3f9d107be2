"""A manifest is read back, hashed without its location, and refused in any other shape."""

import hashlib

import pytest

from firstlight.pipeline.data.manifest import MANIFEST_FILE, canonical_json, is_hash_of, manifest_hash
from firstlight.pipeline.data.store import Store
from tests.support.text_store import assert_store_refused, load_manifest, save_manifest

pytestmark = pytest.mark.usefixtures("own_cache")


def test_manifest_hash_ignores_location_of_source(store_copy: Store) -> None:
    raw = load_manifest(store_copy)
    moved = {**raw, "source": {**raw["source"], "root": "/elsewhere"}}
    assert manifest_hash(moved) == raw["hash"]
    assert manifest_hash({**raw, "classes": ["a", "b", "d"]}) != raw["hash"]
    assert manifest_hash({**raw, "source": {**raw["source"], "fingerprint": "g"}}) != raw["hash"]


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
def test_manifest_of_another_shape_is_refused(store_copy: Store, change: dict) -> None:
    save_manifest(store_copy.path, {**load_manifest(store_copy), **change})
    assert_store_refused(store_copy, MANIFEST_FILE, "is not a manifest of format 3")


@pytest.mark.fault(54, "a shard's name that leads out of its folder")
@pytest.mark.parametrize("name", ["../train-00000.parquet", "/etc/passwd", "a/train-00000.parquet", ""])
def test_shard_name_cannot_lead_out_of_the_folder(store_copy: Store, name: str) -> None:
    raw = load_manifest(store_copy)
    raw["shards"][0]["file"] = name
    save_manifest(store_copy.path, raw)
    assert_store_refused(store_copy, MANIFEST_FILE, "does not follow")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 3}', "\udcff", "[" * 100_000])
def test_file_that_is_no_manifest_is_refused(store_copy: Store, text: str) -> None:
    (store_copy.path / MANIFEST_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_store_refused(store_copy, MANIFEST_FILE, "is not a manifest")


def test_edited_manifest_is_refused(store_copy: Store) -> None:
    file = store_copy.path / MANIFEST_FILE
    file.write_text(file.read_text().replace('"quarantined": 2', '"quarantined": 0'))
    assert_store_refused(store_copy, MANIFEST_FILE, "hash")


def test_canonical_json_ignores_the_order_of_keys() -> None:
    assert (
        canonical_json({"b": [1, 2], "a": None}) == canonical_json({"a": None, "b": [1, 2]}) == b'{"a":null,"b":[1,2]}'
    )


def test_texts_about_the_source_change_no_hash_and_old_hashes_count(store_copy: Store) -> None:
    raw = load_manifest(store_copy)
    other = {**raw, "source": {**raw["source"], "reading": ["other words"], "notes": ["more of them"]}}
    assert manifest_hash(other) == manifest_hash(raw)
    assert is_hash_of(raw)
    # The hash is made as earlier versions made it.
    source = {key: value for key, value in other["source"].items() if key != "root"}
    facts = {key: value for key, value in other.items() if key not in ("hash", "sum")}
    earlier = hashlib.sha256(canonical_json({**facts, "source": source})).hexdigest()
    assert earlier != manifest_hash(other)
    assert is_hash_of({**other, "hash": earlier})
    assert not is_hash_of({**other, "hash": earlier, "classes": ["x"]})

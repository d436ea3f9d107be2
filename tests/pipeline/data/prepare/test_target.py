"""The folder of a store is a function of what decides its content."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.manifest import MANIFEST_FILE, manifest_hash
from firstlight.pipeline.data.prepare import prepare as prepare_module
from firstlight.pipeline.data.prepare.target import _name_folder, describe_other_stores
from firstlight.pipeline.data.sources import identity, open_source
from firstlight.pipeline.data.store import Store
from tests.support.grey_images import dataset, greys, images, local
from tests.support.image_sources import dataset_options


def test_folder_is_a_function_of_decisive_options(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 10)
    first = local(dataset(root=root), tmp_path / "out").path
    assert first.name.startswith("tiny-")
    for same in ({"image_size": 64}, {"val_fraction": 0.3}, {"max_train": 5}, {"max_bad_fraction": 0.5}):
        assert local(dataset(root=root, **same), tmp_path / "out").path == first
    others = [
        local(dataset(root=root, **other), tmp_path / "out").path
        for other in ({"split_seed": 1}, {"max_pixels": 100}, {"test_fraction": 0.5})
    ]
    os.utime(root / "train" / "a" / "000.png", (1, 1))
    others.append(local(dataset(root=root), tmp_path / "out").path)
    assert len({first, *others}) == 5


def test_stated_options_decide_and_their_defaults_do_not(tmp_path: Path) -> None:
    def name_folder(**fields: Any) -> str:
        return _name_folder(dataset_options(source="voc", root="/data", **fields), tmp_path, {}).name

    plain = name_folder()
    assert plain == name_folder(depth=None, mask_values={}, annotated_orientation=None)
    stated: list[dict[str, Any]] = [
        {"depth": 12},
        {"depth": 16},
        {"annotated_orientation": "stored"},
        {"mask_values": {"a": 0, "b": 1}},
        # The classes are numbered in this order.
        {"mask_values": {"b": 1, "a": 0}},
    ]
    assert len({plain, *(name_folder(**fields) for fields in stated)}) == 6


def test_two_places_with_the_same_names_sizes_and_times_have_two_stores(tmp_path: Path) -> None:
    first = images(tmp_path / "v1", 10)
    shutil.copytree(first, tmp_path / "v2", copy_function=shutil.copy2)
    stores = [local(dataset(root=tmp_path / name), tmp_path / "out") for name in ("v1", "v2", "v1")]
    assert stores[0].path == stores[2].path != stores[1].path
    # All results of equal images are equal
    assert stores[0].hash == stores[1].hash
    by_content = [
        local(dataset(root=tmp_path / name, fingerprint="content"), tmp_path / "out") for name in ("v1", "v2")
    ]
    assert by_content[0].path == by_content[1].path


def test_other_pixels_of_the_same_size_and_time_are_another_store(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 10)
    file = root / "train" / "b" / "003.png"
    before, status = local(dataset(root=root), tmp_path / "out"), file.stat()
    data = (root / "train" / "b" / "009.png").read_bytes()
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = local(dataset(root=root), tmp_path / "out")
    assert (after.path != before.path, len(data)) == (True, status.st_size)
    assert (greys(before)[6], greys(after)[6]) == (3, 9)


def write_earlier_store(root: Path, stores: Path, monkeypatch: pytest.MonkeyPatch, **fields: object) -> Store:
    """Writes a store as versions did that knew neither bytes nor places nor what was read as what."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "open_source", lambda options: plain(open_source(options)))
        store = local(dataset(root=root, **fields), stores)
    raw = json.loads((store.path / MANIFEST_FILE).read_bytes())
    raw["source"] = {key: raw["source"][key] for key in ("kind", "root", "fingerprint")}
    del raw["sum"], raw["images"]["colours"]
    raw["hash"] = manifest_hash(raw)
    (store.path / MANIFEST_FILE).write_text(json.dumps(raw))
    return Store.open(store.path)


def plain(source: Any) -> object:
    return identity.replace(source, fingerprint=source.earlier_fingerprint, identity="", reading=(), notes=())


def test_store_of_an_earlier_version_is_used_where_it_has_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = images(tmp_path / "in", 10)
    earlier = write_earlier_store(root, tmp_path / "out", monkeypatch)
    assert "identity" not in earlier.source
    assert local(dataset(root=root), tmp_path / "out") == earlier
    # A whole store of all bytes was asked for
    assert local(dataset(root=root, fingerprint="content"), tmp_path / "out").path != earlier.path
    # Another place, or another reading, which has other splits
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copy2)
    assert local(dataset(root=tmp_path / "copy"), tmp_path / "out").path != earlier.path
    one_split = dataset(root=root, splits={"train": "train"}, test_fraction=0.2)
    assert local(one_split, tmp_path / "out").path != earlier.path


def test_other_stores_of_the_same_source_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path / "in", 10)
    earlier = write_earlier_store(root, tmp_path / "out", monkeypatch)
    os.utime(root / "train" / "a" / "000.png", (1, 1))
    data = dataset(root=root)
    store = local(data, tmp_path / "out")
    assert store.path != earlier.path
    (line,) = describe_other_stores(data, store)
    assert line.startswith(
        f"not used: {earlier.path}, a store of {root} as it was before, or as it is read otherwise (16"
    )
    assert describe_other_stores(dataset(root=tmp_path), store) == []

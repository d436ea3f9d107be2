"""A source becomes a store: the same one however it is written, and a damaged one is refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firstlight.pipeline.data import shards
from firstlight.pipeline.data.images.colours import ColourSums
from firstlight.pipeline.data.manifest import DUPLICATES_FILE, MANIFEST_FILE, QUARANTINE_FILE
from firstlight.pipeline.data.prepare import jobs
from firstlight.pipeline.data.prepare import prepare as module
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.errors import UserError
from tests.support.grey_images import dataset, greys, images, local, png
from tests.support.paths import ROOT


@pytest.mark.usefixtures("small_parts")
def test_folder_becomes_a_store(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    data = dataset(root=images(tmp_path / "in", 25))
    store = prepare(
        data, tmp_path / "out", on_ray=lambda: False, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(10, 31), (20, 31), (25, 31), (31, 31)]
    assert store.splits == {"train": 25, "test": 6}
    assert store.ids("test").tolist() == list(range(25, 31))
    assert list(store.splits) == ["train", "test"]
    assert [(shard.file, shard.first_id, shard.row_groups) for shard in store.shards] == [
        ("train-00000.parquet", 0, (4, 4, 2)),
        ("train-00001.parquet", 10, (4, 4, 2)),
        ("train-00002.parquet", 20, (4, 1)),
        ("test-00000.parquet", 25, (4, 2)),
    ]
    assert greys(store) == [
        *range(0, 25, 2),
        *range(1, 25, 2),
        200,
        202,
        204,
        201,
        203,
        205,
    ]  # by path: class a, then b
    assert store.labels("train").tolist() == [0] * 13 + [1] * 12
    assert store.labels("test").tolist() == [0] * 3 + [1] * 3
    assert store.classes == ("a", "b")
    assert store.quarantined == 0
    assert pq.read_table(store.path / QUARANTINE_FILE).num_rows == 0
    assert pq.read_table(store.path / "test-00000.parquet")["path"][0].as_py() == "test/a/000.png"


@pytest.mark.usefixtures("small_parts")
def test_manifest_has_the_statistics_of_the_images(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 5)
    Image.new("L", (50, 60)).save(root / "train" / "a" / "grey.png")
    store = local(dataset(root=root), tmp_path / "out")
    raw = json.loads((store.path / MANIFEST_FILE).read_text())
    sizes = [[6, 8, 4], [8, 8, 4], [9, 8, 3], [22, 23, 1]]  # quarters of an octave: 3, 4, 5 x 4 pixels, and 50 x 60
    files = sum(file.stat().st_size for file in root.rglob("*.png"))
    colours = ColourSums()
    for file in (root / "train").rglob("*.png"):
        colours.add_image(Image.open(file).convert("RGB"))
    assert raw["images"] == {
        "width": [3, 50],
        "height": [4, 60],
        "bytes": files,
        "sizes": sizes,
        "modes": {"L": 1, "RGB": 11},
        "formats": {"PNG": 12},
        "colours": colours.dump_sums(),
        "labels": {
            "train": {"unknown": 0, "classes": 2, "fewest": 2, "most": 4},
            "test": {"unknown": 0, "classes": 2, "fewest": 3, "most": 3},
        },
        "duplicates": {"copies": 0, "of_train_in_test": 0},
        "readings": {"one_colour": 12},
    }
    assert store.images == raw["images"]
    assert raw["source"]["root"] == str(root)


@pytest.mark.fault(25, "more bad images than max_bad_fraction")
def test_too_many_bad_images_are_refused(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 14, bad=tuple(range(12)))
    for _ in range(2):  # when it is written, and when the finished store is opened
        with pytest.raises(
            UserError,
            match=r"dataset\.max_bad_fraction: 0\.1 is exceeded: 12 of 20 .* e\.g\. train/a/000\.png: .*"
            r"quarantine\.parquet",
        ):
            local(dataset(root=root), tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    assert pq.read_table(folder / QUARANTINE_FILE).num_rows == 12
    assert local(dataset(root=root, max_bad_fraction=0.6), tmp_path / "out").path == folder
    (folder / QUARANTINE_FILE).unlink()
    with pytest.raises(UserError, match=r"quarantine\.parquet: is missing or damaged: .*delete the folder"):
        local(dataset(root=root), tmp_path / "out")


def test_pixel_limit_is_that_of_the_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"16 of 16 images .* is larger than 4 pixels \(dataset\.max_pixels\);"):
        local(dataset(root=images(tmp_path / "in", 10), max_pixels=4), tmp_path / "out")


def test_finished_store_is_opened_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(root=images(tmp_path / "in", 10))
    store = local(data, tmp_path / "out")
    monkeypatch.setattr(module, "PartWriter", None)  # writing would fail
    calls: list[tuple[int, int]] = []
    assert (
        prepare(data, tmp_path / "out", on_ray=lambda: False, progress=lambda done, total: calls.append((done, total)))
        == store
    )
    assert calls == [(10, 16), (16, 16)]  # verified


@pytest.mark.usefixtures("small_parts")
def test_unfinished_store_is_completed(tmp_path: Path) -> None:
    data = dataset(root=images(tmp_path / "in", 25))
    store = local(data, tmp_path / "out")
    expected = {file.name: file.read_bytes() for file in store.path.iterdir()}
    (store.path / MANIFEST_FILE).unlink()
    (store.path / "train-00001.parquet").write_bytes(b"half")
    (store.path / "train-00099.parquet").write_bytes(b"of a larger source")
    (store.path / ".0123.tmp").write_bytes(b"left by a process that was killed")
    local(data, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in store.path.iterdir()} == expected


def test_damaged_store_is_refused(tmp_path: Path) -> None:
    data = dataset(root=images(tmp_path / "in", 10))
    file = local(data, tmp_path / "out").path / "train-00000.parquet"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.parquet: .*sha256.*delete the folder"):
        local(data, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"train-00000\.parquet: is missing.*delete the folder"):
        local(data, tmp_path / "out")


@pytest.mark.fault(24, "a store below a file, and in /proc")
def test_unwritable_storage_is_named(tmp_path: Path) -> None:
    data = dataset(root=images(tmp_path / "in", 10))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: cannot be written: Not a directory"):
        local(data, tmp_path / "file" / "stores")
    with pytest.raises(UserError, match=r"/proc/x: cannot be written: "):
        local(data, Path("/proc/x"))


@pytest.mark.fault(16, "full disk: a shard")
def test_full_disk_names_the_shard_and_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(root=images(tmp_path / "in", 10))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards.pq.ParquetWriter, "write_table", full)
        with pytest.raises(
            UserError, match=r"out/tiny-[0-9a-f]{12}/train-00000\.parquet: cannot be written: No space left on device"
        ):
            local(data, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    assert [file.name for file in folder.iterdir()] == [".lock"]
    assert local(data, tmp_path / "out").path == folder


def test_store_folder_is_readable_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert local(dataset(root=images(tmp_path / "in", 4)), tmp_path / "out").path.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_digits_have_their_test_split(tmp_path: Path) -> None:
    store = local(dataset(source="digits"), tmp_path)
    assert sum(store.splits.values()) == 1797
    assert store.ids("test")[0] == store.splits["train"]
    from sklearn.datasets import load_digits

    both = np.concatenate([store.labels("train"), store.labels("test")])
    np.testing.assert_array_equal(np.bincount(both), np.bincount(load_digits().target))
    np.testing.assert_array_equal(np.bincount(store.labels("test")), np.floor(np.bincount(both) * 0.2 + 0.5))


def test_prepare_imports_no_torch_ray_or_recipe() -> None:
    """They are many processes: torch would cost each of them half a gigabyte and seconds."""
    code = (
        "import sys, firstlight.pipeline.data.prepare.prepare; "
        "sys.exit(bool({'torch', 'ray', 'firstlight.pipeline.config.recipe'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.mark.ray
def test_ray_writes_the_same_bytes(tmp_path: Path, ray_local: None) -> None:
    from ray.data import DataContext

    root, part = tmp_path / "in", module.IMAGES_PER_SHARD
    for k in range(part + 300):  # two parts, so that the second and the test split are numbered again
        file = root / "train" / "abc"[k % 3] / f"{k:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(k % 256) if k not in (5, 6, part + 7) else b"bad")
    images(root, 0)
    data, before = dataset(root=root), DataContext.get_current().enable_progress_bars
    calls: dict[str, list[tuple[int, int]]] = {"local": [], "ray": []}

    def stop(done: int, total: int) -> None:
        if done >= part:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # what is left of it is continued by Ray
        prepare(data, tmp_path / "ray", lambda: False, stop)
    stores = [
        prepare(data, tmp_path / where, lambda ray=where == "ray": ray, lambda *counts, to=found: to.append(counts))
        for where, found in calls.items()
    ]
    first, second = ({file.name: file.read_bytes() for file in store.path.iterdir()} for store in stores)
    assert sorted(first) == [
        ".lock",
        DUPLICATES_FILE,
        MANIFEST_FILE,
        QUARANTINE_FILE,
        "test-00000.parquet",
        "train-00000.parquet",
        "train-00001.parquet",
    ]
    assert first == second
    assert stores[1].quarantined == 3
    assert stores[1].ids("test")[0] == part + 300 - 3
    assert all(found[-1] == (part + 306, part + 306) for found in calls.values())
    assert len(calls["ray"]) == 3, "once for each part"
    assert calls["local"] == sorted(calls["local"])
    assert len(calls["local"]) == 3 + sum((count - 1) // jobs.IMAGES_PER_REPORT for count in (part, 300, 6))
    assert DataContext.get_current().enable_progress_bars == before

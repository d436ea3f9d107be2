"""Compiled ops are loaded once they pay; until then, and where they cannot be used, Pillow makes the same views."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment.compiled import loading
from firstlight.pipeline.data.augment.compiled.loading import CompiledOps
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from tests.support.augmentations import PIPELINES
from tests.support.noise_images import make_noise


def wait(ops: CompiledOps) -> None:
    assert ops._thread is not None
    ops._thread.join()


def test_few_views_load_nothing() -> None:
    ops = CompiledOps()
    assert ops.find(loading.PAYING_PIXELS - 1) is None
    assert ops._thread is None


def test_many_views_load_in_the_background() -> None:
    ops = CompiledOps()
    assert ops.find(loading.PAYING_PIXELS // 2) is None
    assert ops.find(loading.PAYING_PIXELS // 2) is None
    wait(ops)
    assert ops.find(1) is not None
    assert ops.obstacle == ""


def test_views_are_the_same_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CompiledOps()
    monkeypatch.setattr(augment, "compiled_ops", ops)
    monkeypatch.setattr(loading, "PAYING_PIXELS", 3 * 16 * 16)
    images = [Image.fromarray(pixels) for pixels in make_noise(12, 40, 30)]
    ids = np.arange(12)
    drawn = augment.sample_params(PIPELINES["simclr"], derive_view_keys(0, ids, ids, 0), np.tile((40, 30), (12, 1)), 16)
    before = np.stack(list(augment.apply_batch(images, drawn, 16)))
    wait(ops)
    assert ops.find(0) is not None
    assert np.array_equal(np.stack(list(augment.apply_batch(images, drawn, 16))), before)


@pytest.mark.parametrize("module", ["numba", "firstlight.pipeline.data.augment.compiled.compiler"])
def test_pillow_makes_the_views_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in [name for name in sys.modules if name.startswith("firstlight.pipeline.data.augment.compiled.")]:
        if name.rpartition(".")[2] in ("compiler", "views", "resampling", "colors", "filters", "levels", "geometry"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    ops = CompiledOps()
    ops.find(loading.PAYING_PIXELS)
    wait(ops)
    assert "ModuleNotFoundError" in ops.obstacle
    assert ops.find(loading.PAYING_PIXELS) is None


def test_other_pixels_than_pillows_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_difference", lambda make_views: "Blur of 20 x 17 pixels")
    ops = CompiledOps()
    assert ops.load() == "other pixels than Pillow's: Blur of 20 x 17 pixels"
    assert ops.find(loading.PAYING_PIXELS) is None


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ops = CompiledOps()
    assert "NotADirectoryError" in ops.load()
    assert ops.find(loading.PAYING_PIXELS) is None


def test_the_folder_follows_from_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = loading._locate_machine_code()
    assert before == loading._locate_machine_code()
    (tmp_path / "compiled").mkdir()
    for file in [*loading.AUGMENT_SOURCES.glob("*.py"), *loading.AUGMENT_SOURCES.glob("compiled/*.py")]:
        (tmp_path / file.relative_to(loading.AUGMENT_SOURCES)).write_bytes(file.read_bytes())
    monkeypatch.setattr(loading, "AUGMENT_SOURCES", tmp_path)
    assert loading._locate_machine_code() == before
    for file in (tmp_path / "pixel_params.py", tmp_path / "compiled" / "colors.py"):
        file.write_text(file.read_text("utf-8") + "\n", "utf-8")
        assert loading._locate_machine_code() != before
        before = loading._locate_machine_code()


def test_old_versions_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    current = tmp_path / f"{loading.FOLDER_PREFIX}current"
    for age in range(loading.MAX_KEPT_VERSIONS + 3):
        (folder := tmp_path / f"{loading.FOLDER_PREFIX}{age}").mkdir()
        os.utime(folder, (1000 - age, 1000 - age))
    (tmp_path / "another").mkdir()
    current.mkdir()
    loading._remove_old_versions(current)
    kept = {f"{loading.FOLDER_PREFIX}{age}" for age in range(loading.MAX_KEPT_VERSIONS)}
    assert {folder.name for folder in tmp_path.iterdir()} == {*kept, current.name, "another"}

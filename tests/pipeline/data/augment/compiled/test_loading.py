"""Compiled ops are loaded once they pay; until then, and where they cannot be used, Pillow makes the same views."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment.compiled import kept_code, loading
from firstlight.pipeline.data.augment.compiled.loading import CompiledOps
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from tests.support.augmentations import PIPELINES
from tests.support.compiled_views import compile_views
from tests.support.noise_images import make_noise


@pytest.fixture(autouse=True)
def pays_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine code of this checkout is kept, so that nothing is compiled."""
    compile_views()
    monkeypatch.setattr(loading, "PAYING_SECONDS", 0.01)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def spend(ops: CompiledOps, seconds: float) -> None:
    with ops.count_time():
        begun = time.thread_time()
        while time.thread_time() - begun < seconds:
            pass


def test_few_views_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PAYING_SECONDS", 100.0)
    ops = CompiledOps()
    spend(ops, 0.01)
    assert ops.find() is None


def test_many_views_load_what_is_kept() -> None:
    ops = CompiledOps()
    assert ops.find() is None
    spend(ops, 0.011)
    assert ops.find() is not None
    assert ops.obstacle == ""


def test_views_are_the_same_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CompiledOps()
    monkeypatch.setattr(augment, "compiled_ops", ops)
    monkeypatch.setattr(loading, "PAYING_SECONDS", 1e-9)
    images = [Image.fromarray(pixels) for pixels in make_noise(12, 40, 30)]
    ids = np.arange(12)
    drawn = augment.sample_params(PIPELINES["simclr"], derive_view_keys(0, ids, ids, 0), np.tile((40, 30), (12, 1)), 16)
    before = np.stack(list(augment.apply_batch(images, drawn, 16)))
    assert ops._make_views is None
    assert np.array_equal(np.stack(list(augment.apply_batch(images, drawn, 16))), before)
    assert ops._make_views is not None
    assert list(augment.apply_batch([], [type(op)(op.kind, op.rows[:0]) for op in drawn], 16)) == []


def test_only_one_thread_loads_them() -> None:
    ops = CompiledOps()
    spend(ops, 0.011)
    with ops._lock:
        assert ops.find() is None
    assert ops.find() is not None


def test_another_process_compiles_meanwhile(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, started = CompiledOps(), list[subprocess.Popen[bytes]]()

    def start(name: str) -> subprocess.Popen[bytes]:
        assert name == kept_code.__name__
        code = 'import sys; sys.stdin.read(1); print(\'{"problem": "OSError: full"}\')'
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(loading, "start_module", start)
    spend(ops, 0.011)
    assert ops.find() is None
    assert ops.find() is None
    (compiler,) = started
    assert compiler.stdin is not None
    compiler.stdin.close()
    compiler.wait()
    assert ops.find() is None
    assert ops.obstacle == "OSError: full"
    assert ops.find() is None
    assert len(started) == 1


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os._exit(3)", "the process that compiled has ended with 3"),
        ("print('no JSON')", "the process that compiled has ended with 0"),
        ('print(\'{"problem": ""}\')', "the machine code is damaged"),
    ],
)
def test_a_compiler_that_fails_is_no_error(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, code: str, problem: str
) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(loading, "start_module", start)
    ops = CompiledOps()
    assert ops.load() == problem
    assert ops.find() is None


def test_a_process_that_cannot_be_started_is_no_error(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        raise OSError("no more processes")

    monkeypatch.setattr(loading, "start_module", start)
    ops = CompiledOps()
    spend(ops, 0.011)
    assert ops.find() is None
    assert ops.obstacle == "OSError: no more processes"


def test_other_pixels_than_pillows_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_difference", lambda make_views: "Blur of 20 x 17 pixels")
    ops = CompiledOps()
    assert ops.load() == "other pixels than Pillow's: Blur of 20 x 17 pixels"
    assert ops.find() is None


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "NotADirectoryError" in CompiledOps().load()


def test_numba_that_is_missing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> str:
        raise loading_error(name)

    loading_error = kept_code.importlib.metadata.PackageNotFoundError
    monkeypatch.setattr(kept_code.importlib.metadata, "version", find_nothing)
    ops = CompiledOps()
    assert "numba" in ops.load()
    assert ops.find() is None

"""The compiler keeps what it made in a folder, where other processes find it."""

from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.augment.compiled.compiler import compile_for_python, compiled, config


@compiled
def add_up(numbers: np.ndarray) -> float:
    return float(numbers.sum())


def fill_views(pixels: np.ndarray, steps: np.ndarray, weights: np.ndarray, views: np.ndarray) -> None:
    views[:] = np.uint8(add_up(steps[0]))


def test_machine_code_is_kept_in_the_folder(tmp_path: Path) -> None:
    before = config.CACHE_DIR
    fill = compile_for_python(fill_views, tmp_path)
    assert before == config.CACHE_DIR
    assert list(tmp_path.rglob("*.nbc"))
    views = np.empty((1, 2, 2, 3), np.uint8)
    fill(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 3), 7.0), np.zeros((1, 2, 1), np.int32), views)
    assert (views == 42).all()
    again = compile_for_python(fill_views, tmp_path)
    assert sum(again.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]


def test_numba_that_does_not_compile_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DISABLE_JIT", 1)
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        compile_for_python(fill_views, tmp_path)

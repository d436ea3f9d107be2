"""The arms that feed a GPU load what they say, and are compared with as many decoding tasks."""

from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import gpu_feeding
from bench.photographs import PHOTOGRAPH_BATCH, make_photograph_recipe, prepare_photographs
from tests.support.photograph_folders import write_photographs

SIDE = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "photographs", 140)


def test_arms_give_two_views_and_the_host_of_a_gpu_crops_only(folder: Path, tmp_path: Path) -> None:
    recipe = make_photograph_recipe(folder, tmp_path, SIDE, train_augment=gpu_feeding.SIMCLR_OPS)
    store = prepare_photographs(recipe, tmp_path / "stores")
    whole, again, crops = (
        next(gpu_feeding.iterate_stream(recipe, store, tasks, crops_only))["views"]
        for tasks, crops_only in ((1, False), (3, False), (3, True))
    )
    assert whole.shape == crops.shape == (PHOTOGRAPH_BATCH, 2, SIDE, SIDE, 3)
    assert (whole == again).all()
    assert (whole != crops).any()
    for images, _ in islice(gpu_feeding.iterate_dataloader(folder, SIDE, 1), 3):
        assert images.shape == (PHOTOGRAPH_BATCH, 2, 3, SIDE, SIDE)


def test_command_prints_a_row_of_each_arm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_feeding, "count_usable_cpus", lambda: 1)
    options = [str(folder), "--side", str(SIDE), "--batches", "1", "--rounds", "1"]
    answer = CliRunner().invoke(gpu_feeding.main, options, catch_exceptions=False)
    rows = [line.split("│") for line in answer.output.splitlines() if "│ 1 " in line]
    assert [row[2].strip() for row in rows] == ["DataLoader", "ours, augment: cpu", "ours, augment: device"]
    assert rows[0][4].strip() == "1.00"

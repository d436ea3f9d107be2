"""A training is still rising only where every seed says so, by more than chance on the held-out images."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from firstlight.pipeline.report.first_screen.training_trend import RisingTraining, find_rising_trainings
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.metrics import METRICS_FILE
from tests.support import recipes
from tests.support.stage_results import finished

MANY = 10_000


def watched(folder: Path, seed: int, curve: Sequence[float], stage: str = "pretrain") -> StageInstance:
    """A finished training of an epoch for each value of the curve, with a row without it in between."""
    instance = finished(folder, stage, seed, {})
    rows = []
    for epoch, value in enumerate(curve, 1):
        common = {"of": 10 * len(curve), "time": 1.0, "images_per_s": 9.0, "loss": 1.0, "steps_per_epoch": 10}
        rows += [{"step": 10 * epoch - 5, **common}, {"step": 10 * epoch, **common, "watch_knn": value}]
    (instance.folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return instance


def find(tmp_path: Path, *curves: Sequence[float], held_out: int = MANY) -> list[RisingTraining]:
    instances = [watched(tmp_path, seed, curve) for seed, curve in enumerate(curves)]
    return find_rising_trainings(recipes.recipe(tmp_path), instances, held_out)


def test_rise_in_every_seed_is_found_with_its_epochs(tmp_path: Path) -> None:
    (found,) = find(tmp_path, [0.3, 0.4, 0.50, 0.60], [0.3, 0.4, 0.52, 0.58])
    assert (found.stage, found.epochs) == ("pretrain", (3.0, 4.0))
    assert found.before == pytest.approx(0.51)
    assert found.last == pytest.approx(0.59)
    assert str(found.length) == "2 epochs"


def test_end_is_a_quarter_of_the_measurements(tmp_path: Path) -> None:
    (found,) = find(tmp_path, [0.1 + 0.05 * k for k in range(12)])
    assert found.epochs == (9.0, 12.0)


@pytest.mark.parametrize(
    "curves",
    [
        [[0.3, 0.4, 0.5, 0.6], [0.3, 0.6, 0.58, 0.57]],
        [[0.3, 0.5, 0.6, 0.599]],
        [[0.30, 0.5, 0.600, 0.603]],
        [[0.4, 0.6]],
        [[]],
    ],
    ids=["one seed falls", "falls", "hardly rises", "two measurements", "not watched"],
)
def test_trend_is_not_reported_for_other_curves(tmp_path: Path, curves: list[list[float]]) -> None:
    assert find(tmp_path, *curves) == []


def test_rise_within_the_chance_of_few_held_out_images_is_not_reported(tmp_path: Path) -> None:
    curve = [0.3, 0.4, 0.50, 0.54]
    assert find(tmp_path / "few", curve, held_out=100) == []
    assert find(tmp_path / "none", curve, held_out=0) == []
    assert len(find(tmp_path / "many", curve)) == 1


def test_other_stages_and_unfinished_trainings_are_left_out(tmp_path: Path) -> None:
    curve = [0.3, 0.4, 0.5, 0.6]
    tuned = watched(tmp_path, 0, curve, "finetune")
    stopped = watched(tmp_path, 1, curve)
    stopped.result_file.unlink()
    assert find_rising_trainings(recipes.recipe(tmp_path), [tuned, stopped], MANY) == []

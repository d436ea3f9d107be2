"""The numbers of a recipe's run in MLflow."""

import math
from pathlib import Path

import pytest

from firstlight.pipeline.report.summary_metrics import list_summary_metrics
from firstlight.pipeline.stages.score_rows import ScoreRow, judge_rows
from tests.support import recipes


def make_row(*pretrained: float, baseline: tuple[float, ...] = (0.2, 0.3), key: str = "knn") -> ScoreRow:
    return ScoreRow("evaluate", "kNN (k=5)", "random weights", pretrained, baseline, key, "pretrained")


def test_keys_are_those_of_the_recipe(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[3, 7])
    assert list_summary_metrics(recipe, judge_rows([make_row(0.5, 0.25)])) == {
        "evaluate/knn/pretrained/seed3": 0.5,
        "evaluate/knn/pretrained/seed7": 0.25,
        "evaluate/knn/random/seed3": 0.2,
        "evaluate/knn/random/seed7": 0.3,
        "evaluate/knn/pretrained/mean_gain_percent": pytest.approx(12.5),
    }


def test_scores_that_do_not_exist_are_left_out(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[3, 7])
    found = list_summary_metrics(recipe, judge_rows([make_row(math.nan, 0.25)]))
    assert set(found) == {f"evaluate/knn/{arm}" for arm in ("pretrained/seed7", "random/seed3", "random/seed7")}


def test_row_without_a_baseline_has_scores_and_no_gain(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[3, 7])
    assert list_summary_metrics(recipe, [make_row(0.5, 0.25, baseline=())]) == {
        "evaluate/knn/pretrained/seed3": 0.5,
        "evaluate/knn/pretrained/seed7": 0.25,
    }

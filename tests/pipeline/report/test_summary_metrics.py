"""The numbers of a recipe's run in MLflow."""

import math
from pathlib import Path

import pytest

from firstlight.pipeline.report.summary_metrics import list_summary_metrics
from firstlight.pipeline.stages.score_rows import ScoreRow, judge_rows, score_rows
from tests.support import recipes
from tests.support.stage_results import ARM_SCORES, finish_arms, with_given


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


def test_gains_over_given_and_over_fresh_weights_are_apart(tmp_path: Path) -> None:
    recipe = with_given(tmp_path, stages__evaluate__arms=["pretrained", "given", "random"])
    rows = score_rows(recipe, finish_arms(tmp_path, "evaluate"))
    found = list_summary_metrics(recipe, rows)
    for arm in ("pretrained", "given", "random"):
        assert [found[f"evaluate/knn/{arm}/seed{seed}"] for seed in range(3)] == list(ARM_SCORES[arm])
    gains = {key.removesuffix("/mean_gain_percent"): value for key, value in found.items() if "mean_gain" in key}
    assert {key: gain for key, gain in gains.items() if "/knn/" in key} == {
        "evaluate/knn/pretrained/against_given": pytest.approx(2.0),
        "evaluate/knn/pretrained": pytest.approx(42.0),
        "evaluate/knn/given": pytest.approx(40.0),
    }
    assert "evaluate/knn/pretrained/against_given/gain_p_value" in found

"""Rows of scores of finished stages."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from firstlight.pipeline.stages.score_rows import ScoreRow, score_rows
from firstlight.pipeline.train.metrics import METRICS_FILE
from tests.support import recipes
from tests.support.stage_results import ARM_SCORES, OWN, evaluated, finish_arms, finished, with_given, with_own


def named(stage: str, label: str, against: str, *scores: Any) -> ScoreRow:
    """A row of two arms, named after its measure."""
    return ScoreRow(stage, label, against, *scores, baseline_arm=against.partition(" ")[0], label=label)


def test_rows_are_the_test_accuracies_of_what_has_finished(tmp_path: Path) -> None:
    tuned = {"labels": 40} | {
        arm: {"val": 0.0, "test": score, "scores": {"test": {"accuracy": score}}}
        for arm, score in (("pretrained", 0.9), ("scratch", 0.8))
    }
    instances = [
        finished(tmp_path, "pretrain", 0, {"images": 100}),
        finished(tmp_path, "evaluate", 0, evaluated(0.0)),
        finished(tmp_path, "evaluate", 1, evaluated(0.03125)),
        finished(tmp_path, "evaluate", 2, None),
        finished(tmp_path, "finetune", 0, tuned),
    ]
    found = score_rows(recipes.recipe(tmp_path, seeds=[0, 1, 2]), instances)
    assert [replace(row, verdict=None) for row in found] == [
        named("evaluate", "kNN (k=5)", "random weights", (0.5, 0.53125), (0.1, 0.13125), "knn"),
        named("evaluate", "linear probe", "random weights", (0.6, 0.63125), (0.2, 0.23125), "probe"),
        named("finetune", "classify, 40 labels", "scratch", (0.9,), (0.8,), "accuracy"),
    ]
    assert [row.verdict.text for row in found if row.verdict] == ["2 seeds: no verdict"] * 2 + ["one seed: no verdict"]


def test_each_pair_of_three_arms_is_a_row_with_a_name_of_its_own(tmp_path: Path) -> None:
    rows = score_rows(with_given(tmp_path), finish_arms(tmp_path, "evaluate"))
    assert [(row.measure, row.arm, row.baseline_arm, row.against) for row in rows] == [
        (f"{label}{name}", arm, baseline, against)
        for label in ("kNN (k=5)", "linear probe")
        for name, arm, baseline, against in (
            (", against given", "pretrained", "given", "given weights"),
            ("", "pretrained", "random", "random weights"),
            (", given", "given", "random", "random weights"),
        )
    ]
    for row in rows[:3]:
        for arm, scores in ((row.arm, row.pretrained), (row.baseline_arm, row.baseline)):
            assert scores == ARM_SCORES[arm]
    assert [row.continues_given for row in rows[:3]] == [row.is_beside for row in rows[:3]] == [True, False, False]
    assert {row.label for row in rows[:3]} == {"kNN (k=5)"}


def test_all_pairs_count_in_the_correction_of_the_table(tmp_path: Path) -> None:
    rows = score_rows(with_given(tmp_path), finish_arms(tmp_path, "evaluate") + finish_arms(tmp_path, "finetune"))
    assert len(rows) == 9
    for row in rows:
        assert row.verdict is not None
        assert row.verdict.p_value == pytest.approx(
            min(1.0, len(rows) * stats.ttest_rel(row.pretrained, row.baseline).pvalue)
        )


def test_weights_alone_are_compared_with_fresh_ones(tmp_path: Path) -> None:
    stages = {"finetune": recipes.RECIPE["stages"]["finetune"]}
    rows = score_rows(with_given(tmp_path, stages=stages), finish_arms(tmp_path, "finetune"))
    assert [(row.measure, row.arm, row.against, row.is_beside) for row in rows] == [
        ("classify, 40 labels, given", "given", "scratch", False)
    ]


def test_pretrained_and_given_arms_alone_are_one_row(tmp_path: Path) -> None:
    recipe = with_given(tmp_path, stages__evaluate__arms=["pretrained", "given"])
    row, _ = score_rows(recipe, finish_arms(tmp_path, "evaluate"))
    assert (row.measure, row.against, row.is_beside, row.continues_given) == (
        *("kNN (k=5)", "given weights", False, True),
    )


def test_no_finished_stage_has_no_rows(tmp_path: Path) -> None:
    assert (
        score_rows(
            recipes.recipe(tmp_path), [finished(tmp_path, "evaluate", 0, None), finished(tmp_path, "finetune", 0, None)]
        )
        == []
    )


@pytest.mark.parametrize("measure", OWN)
def test_missing_numbers_are_no_rows(tmp_path: Path, measure: str) -> None:
    instance = finished(tmp_path, "pretrain", 0, {"images": 100, "accuracy": {}, "held_out": {}})
    row = {"step": 1, "of": 3, "time": 1.0, "images_per_s": 1.0, "loss": 1.0}
    (instance.folder / METRICS_FILE).write_text(json.dumps(row) + "\n")
    assert score_rows(with_own(tmp_path, measure, 1.0), [instance]) == []

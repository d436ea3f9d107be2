"""Rows of scores of finished stages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from firstlight.pipeline.stages.score_rows import ScoreRow, score_rows
from firstlight.pipeline.train.metrics import METRICS_FILE
from tests.support import recipes
from tests.support.stage_results import OWN, evaluated, finished, with_own


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
        ScoreRow("evaluate", "kNN (k=5)", "random weights", (0.5, 0.53125), (0.1, 0.13125), "knn"),
        ScoreRow("evaluate", "linear probe", "random weights", (0.6, 0.63125), (0.2, 0.23125), "probe"),
        ScoreRow("finetune", "classify, 40 labels", "scratch", (0.9,), (0.8,), "accuracy"),
    ]
    assert [row.verdict.text for row in found if row.verdict] == ["2 seeds: no verdict"] * 2 + ["one seed: no verdict"]


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

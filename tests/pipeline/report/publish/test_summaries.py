"""Scores that lists of runs show, with those of the baseline and of given weights."""

from typing import Any

import pytest

from firstlight.pipeline.report.publish.summaries import Score, summarise_run
from firstlight.pipeline.tracking.lineage import Run


def run_with(kind: str, metrics: dict[str, float]) -> Run:
    return Run("id", kind, kind, "FINISHED", 0.0, 1.0, None, "", None, {}, {}, metrics)


def test_scores_of_layers_have_those_of_random_weights_as_baseline() -> None:
    metrics = {"pretrained/knn_test": 0.5, "pretrained/probe_layer-2_test": 0.7, "random/probe_layer-2_test": 0.2}
    assert summarise_run(run_with("evaluate", metrics)) == {
        "kNN": Score(0.5, None, "random"),
        "probe layer -2": Score(0.7, 0.2, "random"),
    }


def test_scores_over_the_bank_have_random_weights_without_a_bank_as_baseline() -> None:
    metrics = {"pretrained/knn_bank_test": 0.6, "pretrained/knn_test": 0.5, "random/knn_test": 0.2}
    assert summarise_run(run_with("evaluate", metrics)) == {
        "kNN of the bank": Score(0.6, 0.2, "random"),
        "kNN": Score(0.5, 0.2, "random"),
    }


def test_given_weights_stand_between_pretrained_and_random_ones() -> None:
    metrics = {"pretrained/knn_test": 0.5, "given/knn_test": 0.4, "random/knn_test": 0.2}
    assert summarise_run(run_with("evaluate", metrics)) == {"kNN": Score(0.5, 0.2, "random", given_value=0.4)}
    del metrics["pretrained/knn_test"]
    assert summarise_run(run_with("evaluate", metrics)) == {"kNN, given": Score(0.4, 0.2, "random")}
    found = {f"{arm}/mean_average_precision": score for arm, score in (("given", 0.4), ("random", 0.2))}
    assert summarise_run(run_with("retrieve", found)) == {"mAP, given": Score(0.4, 0.2, "random")}
    assert summarise_run(run_with("retrieve", found | {"pretrained/mean_average_precision": 0.5})) == {
        "mAP": Score(0.5, 0.2, "random", given_value=0.4)
    }


def test_loss_has_no_unit_and_accuracies_are_shares() -> None:
    metrics = {"loss": 0.75, "own_classifier/test": 0.5, "watch_knn": 0.25, "images_per_s": 9.0}
    run = run_with("pretrain", metrics)
    assert summarise_run(run) == {
        "loss": Score(0.75, scale=1.0, unit=""),
        "own classifier": Score(0.5),
        "held-out kNN": Score(0.25),
    }


@pytest.mark.parametrize(
    ("arms", "scores"),
    [
        ("('pretrained', 'scratch')", {"classify": Score(0.5, 0.25, "scratch")}),
        ("('pretrained',)", {"classify, pretrained": Score(0.5)}),
        (
            "('pretrained', 'given', 'scratch')",
            {"classify": Score(0.5, 0.25, "scratch", given_value=0.375)},
        ),
        ("('given', 'scratch')", {"classify, given": Score(0.375, 0.25, "scratch")}),
        ("('pretrained', 'given')", {"classify": Score(0.5, 0.375, "given")}),
        ("('absent',)", {}),
        ("", {}),
    ],
)
def test_last_arm_is_the_baseline_of_the_others(arms: str, scores: dict[str, Score]) -> None:
    params: dict[str, Any] = {"stage.arms": arms, "stage.task.name": "classify"}
    metrics = {"pretrained/test": 0.5, "given/test": 0.375, "scratch/test": 0.25}
    run = Run("id", "finetune", "finetune", "FINISHED", 0.0, 1.0, None, "", None, {}, params, metrics)
    assert summarise_run(run) == scores


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        ({"psnr_test": 23.5}, {"PSNR": Score(23.5, scale=1.0, unit=" dB")}),
        ({"psnr_val": 22.0}, {"PSNR": Score(22.0, scale=1.0, unit=" dB")}),
        ({}, {}),
    ],
)
def test_ratio_is_listed_in_decibels(metrics: dict[str, float], score: dict[str, Score]) -> None:
    run = run_with("reconstruct", metrics)
    assert summarise_run(run) == score


@pytest.mark.parametrize(
    ("metrics", "scores"),
    [
        ({"own/score_test": 0.5, "own/score_val": 0.4, "loss": 1.0}, {"score": Score(0.5)}),
        ({"random/score_test": 0.25, "pretrained/score_test": 0.5}, {"score": Score(0.5, 0.25, "random")}),
        (
            {"given/score_test": 0.375, "pretrained/score_test": 0.5, "random/score_test": 0.25},
            {"score": Score(0.5, 0.25, "random", given_value=0.375)},
        ),
        ({"loss": 1.0}, {}),
    ],
)
def test_scores_on_test_images_are_compared_with_the_other_arm(
    metrics: dict[str, float], scores: dict[str, Score]
) -> None:
    run = run_with("toy", metrics)
    assert summarise_run(run) == scores

"""The logged metrics that become the scores of a run, and their notation."""

from typing import Any

import pytest

from firstlight.pipeline.report.run_scores import format_image_counts, format_scores
from firstlight.pipeline.tracking.lineage import Run


def run_of(kind: str, metrics: dict[str, float], params: dict[str, Any] | None = None) -> Run:
    return Run("id", kind, kind, "FINISHED", 0.0, 1.0, None, "", None, {}, params or {}, metrics)


FINETUNE = {"stage.arms": "('pretrained', 'scratch', 'frozen')", "stage.task.name": "classify"}


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (run_of("pretrain", {"loss": 0.75, "images_per_s": 9.0}), "loss 0.750"),
        (
            run_of("pretrain", {"loss": 0.5, "own_classifier/test": 0.25, "watch_knn": 0.5}),
            "loss 0.500, own classifier 25.0 %, held-out kNN 50.0 %",
        ),
        (
            run_of("evaluate", {"pretrained/probe_layer-2_test": 0.5, "random/probe_layer-2_test": 0.125}),
            "probe layer -2 50.0 % (random 12.5)",
        ),
        (run_of("evaluate", {"pretrained/knn_test": 0.5, "pretrained/knn_val": 0.6}), "kNN 50.0 %"),
        (
            run_of("evaluate", {"pretrained/knn_test": 0.5, "given/knn_test": 0.375, "random/knn_test": 0.125}),
            "kNN 50.0 % (given 37.5, random 12.5)",
        ),
        (run_of("evaluate", {"given/knn_test": 0.5, "random/knn_test": 0.125}), "kNN, given 50.0 % (random 12.5)"),
        (run_of("retrieve", {"pretrained/mean_average_precision": 0.5}), "mAP 50.0 %"),
        (run_of("retrieve", {"random/mean_average_precision": 0.5}), ""),
        (run_of("embed", {"loss": 1.0}), ""),
        (run_of("finetune", {"pretrained/test": 0.5}, FINETUNE), "classify, pretrained 50.0 %"),
        (
            run_of("finetune", {"pretrained/test": 0.5, "scratch/test": 0.25, "frozen/test": 0.125}, FINETUNE),
            "classify 50.0 % (frozen 12.5), classify, scratch 25.0 % (frozen 12.5)",
        ),
    ],
)
def test_scores_of_each_kind_of_run(run: Run, text: str) -> None:
    assert format_scores([run]) == text


def test_seeds_have_mean_and_standard_deviation() -> None:
    seeds = [run_of("evaluate", {"pretrained/knn_test": 0.5 + k / 10, "random/knn_test": 0.25}) for k in range(3)]
    assert format_scores(seeds) == "kNN 60.0 ± 10.0 % (random 25.0)"


def test_no_runs_have_no_scores() -> None:
    assert format_scores([]) == ""


def test_image_counts_begin_with_train() -> None:
    counts = {"images_test": 359.0, "images_train": 1438.0, "images_val": 5.0, "loss": 1.0}
    assert format_image_counts(counts) == "train 1,438, test 359, val 5"
    assert format_image_counts({"images_train": 2.0, "quarantined": 3.0}) == "train 2, 3 quarantined"

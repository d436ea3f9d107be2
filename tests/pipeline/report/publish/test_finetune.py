"""Fine-tunings: scores of arms against the last arm, and scores by class."""

from typing import Any

import pytest

from firstlight.pipeline.report.publish.finetune import FinetunePublisher, _flatten_scores
from firstlight.pipeline.report.publish.publisher import Score
from firstlight.pipeline.tracking.lineage import Run


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
    assert FinetunePublisher().summarise(run) == scores


def test_scores_by_class_have_a_key_for_each_class_with_a_value() -> None:
    scores = {"accuracy": 0.5, "iou": [0.25, None, 0.75]}
    assert _flatten_scores(scores, ("cat", "dog", "a/b")) == {"accuracy": 0.5, "iou/cat": 0.25, "iou/a_b": 0.75}

"""Fine-tunings: scores of arms against the last arm, and scores by class."""

from firstlight.pipeline.report.publish.finetune import _flatten_scores


def test_scores_by_class_have_a_key_for_each_class_with_a_value() -> None:
    scores = {"accuracy": 0.5, "iou": [0.25, None, 0.75]}
    assert _flatten_scores(scores, ("cat", "dog", "a/b")) == {"accuracy": 0.5, "iou/cat": 0.25, "iou/a_b": 0.75}

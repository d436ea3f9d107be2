"""Rows of a table with their verdicts, from the scores of seeds."""

from collections.abc import Sequence

from firstlight.pipeline.config.measures import GIVEN_ARM
from firstlight.pipeline.stages.score_rows import ScoreRow, judge_rows

# Scores of three seeds whose gains over `LOW` are clear, clearly negative, and neither.
LOW, HIGH, WORSE, ALIKE = (0.40, 0.41, 0.42), (0.80, 0.82, 0.81), (0.20, 0.22, 0.21), (0.42, 0.40, 0.43)


def compared(
    scores: Sequence[float],
    baseline: Sequence[float] = LOW,
    label: str = "kNN (k=20)",
    stage: str = "evaluate",
    against: str = "random weights",
    key: str = "knn",
    arm: str = "pretrained",
    baseline_arm: str = "random",
) -> ScoreRow:
    """A row that compares two arms, without its verdict."""
    return ScoreRow(
        stage, label, against, tuple(scores), tuple(baseline), key, arm, baseline_arm=baseline_arm, label=label
    )


def judged(*rows: ScoreRow) -> list[ScoreRow]:
    return judge_rows(rows)


def three_arms(continued: Sequence[float], given: Sequence[float] = HIGH) -> list[ScoreRow]:
    """The rows of a measure of pretrained, given and random weights."""
    return judged(
        compared(continued, given, against="given weights", baseline_arm=GIVEN_ARM),
        compared(continued),
        compared(given, arm=GIVEN_ARM),
    )

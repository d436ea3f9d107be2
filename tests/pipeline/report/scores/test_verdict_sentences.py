"""Verdicts in plain sentences."""

from pathlib import Path

import pytest

from firstlight.pipeline.report.scores.verdict_sentences import summarise_verdicts
from firstlight.pipeline.stages.score_rows import ScoreRow, judge_rows, score_rows
from tests.support.stage_results import finish_arms, with_given

UP, DOWN, SAME = (2.0, 2.5, 3.0), (-2.0, -2.5, -3.0), (-1.0, 1.0, 0.5)
UNTESTED = (7.0, 7.0, 7.0)


def row(gain: tuple[float, ...], arm: str = "pretrained", against: str = "random") -> ScoreRow:
    scores = tuple(0.5 + one / 100 for one in gain)
    beside = against == "given"
    named = f"kNN, {arm}, {against}"
    return ScoreRow("evaluate", named, against, scores, (0.5,) * len(gain), "knn", arm, 100.0, None, against, beside)


def sentences(*rows: ScoreRow, is_continued: bool = True) -> list[str]:
    return summarise_verdicts(judge_rows(rows), is_continued)


def test_sentence_counts_the_verdicts_of_the_table() -> None:
    found = sentences(*map(row, [(20.0, 20.1, 20.2), SAME, (0.3, -1.0, 1.0), UNTESTED]))
    assert found == [
        "Compared with the same network without it, pretraining helps in 1, makes no clear difference in 2 of 3 "
        "measures."
    ]
    assert sentences() == []
    assert sentences(row((7.0,))) == ["There is no verdict: one seed; a verdict needs 3 seeds or more."]


@pytest.mark.parametrize(
    ("gains", "is_continued", "text"),
    [
        (
            [SAME, SAME],
            True,
            "Continued pretraining is clearly better than the given weights in none of 2 measures, as far as these "
            "seeds can tell: the given weights are better left alone.",
        ),
        (
            [SAME, (-20.0, -20.1, -20.2)],
            True,
            "Continued pretraining is clearly better than the given weights in none of 2 measures, and clearly worse "
            "in 1: the given weights are better left alone.",
        ),
        (
            [SAME, (20.0, 20.1, 20.2)],
            True,
            "Continued pretraining is clearly better than the given weights in 1 of 2 measures, and clearly worse in "
            "none: it was worth continuing.",
        ),
        (
            [(-20.0, -20.1, -20.2), (20.0, 20.1, 20.2)],
            True,
            "Continued pretraining is clearly better than the given weights in 1 of 2 measures, and clearly worse in "
            "1: which weights are better depends on the measure.",
        ),
        (
            [SAME],
            False,
            "Pretraining that began from other weights is clearly better than the given weights in none of 1 measure, "
            "as far as these seeds can tell: the given weights are better left alone.",
        ),
        (
            [UNTESTED, (20.0, 20.1, 20.2)],
            True,
            "Continued pretraining is clearly better than the given weights in 1 of 1 measure, and clearly worse in "
            "none: it was worth continuing.",
        ),
    ],
)
def test_sentence_says_if_the_given_weights_are_better_left_alone(
    gains: list[tuple[float, ...]], is_continued: bool, text: str
) -> None:
    assert sentences(*(row(gain, against="given") for gain in gains), is_continued=is_continued) == [text]


def test_three_arms_have_a_sentence_for_each_question(tmp_path: Path) -> None:
    rows = score_rows(with_given(tmp_path), finish_arms(tmp_path, "evaluate"))
    assert summarise_verdicts(rows, is_continued=True) == [
        "Compared with fresh weights, pretraining helps in 2 of 2 measures.",
        "Compared with fresh weights, the given weights help in 2 of 2 measures.",
        "Continued pretraining is clearly better than the given weights in none of 2 measures, as far as these seeds "
        "can tell: the given weights are better left alone.",
    ]


def test_given_weights_are_not_called_a_pretraining() -> None:
    found = sentences(row((20.0, 20.1, 20.2), arm="given"), row((-20.0, -20.1, -20.2), arm="given"))
    assert found == ["Compared with fresh weights, the given weights help in 1, hurt in 1 of 2 measures."]


def test_two_seeds_have_no_sentence_about_the_given_weights(tmp_path: Path) -> None:
    rows = score_rows(with_given(tmp_path), finish_arms(tmp_path, "evaluate", seeds=2))
    assert summarise_verdicts(rows, is_continued=True) == [
        "There is no verdict: 2 seeds; a verdict needs 3 seeds or more."
    ]

"""Verdicts: a paired t test for each row of a table, corrected for its rows."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from firstlight.pipeline.stages.verdicts import TABLE_LEVEL, judge_gains

NUM_TABLES = 20_000
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _draw_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(0.9, 0.02, shape)


def _draw_heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(0.9 + 0.01 * rng.standard_t(3, shape))


def _draw_accuracies_of_sixty_images(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.binomial(60, 0.9, shape) / 60


@pytest.mark.parametrize(("seeds", "rows"), [(3, 1), (3, 4), (5, 3), (5, 12)])
@pytest.mark.parametrize("draw", [_draw_normal, _draw_heavy_tailed, _draw_accuracies_of_sixty_images])
def test_at_most_five_percent_of_tables_without_effect_have_a_verdict(draw: Draw, seeds: int, rows: int) -> None:
    """Both arms are drawn alike. The bound allows three standard errors of the simulation."""
    rng = np.random.default_rng(0)
    shape = (NUM_TABLES, rows, seeds)
    gains = 100 * (draw(rng, shape) - draw(rng, shape))
    wrong = sum(any(verdict.effect != "none" for verdict in judge_gains(list(table))) for table in gains) / NUM_TABLES
    assert wrong <= TABLE_LEVEL + 3 * np.sqrt(TABLE_LEVEL * (1 - TABLE_LEVEL) / NUM_TABLES)
    if draw is _draw_normal and rows == 1:
        assert wrong >= TABLE_LEVEL - 3 * np.sqrt(TABLE_LEVEL * (1 - TABLE_LEVEL) / NUM_TABLES)


def test_intervals_of_a_table_cover_the_true_gains_together() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([0.0, 3.0, -5.0])
    tables = truth[:, None] + rng.normal(0, 2, (4000, 3, 3))
    covered = 0
    for table in tables:
        intervals = [verdict.interval for verdict in judge_gains(list(table))]
        covered += all(i is not None and i[0] <= gain <= i[1] for i, gain in zip(intervals, truth, strict=True))
    assert covered / len(tables) == pytest.approx(1 - TABLE_LEVEL, abs=0.015)


@pytest.mark.parametrize("rows", [1, 5])
def test_p_value_is_that_of_scipy_times_the_rows(rows: int) -> None:
    a, b = np.array([95.2, 94.1, 96.3, 95.9]), np.array([94.8, 93.5, 96.0, 94.9])
    verdict = judge_gains([a - b] * rows)[0]
    assert verdict.p_value == pytest.approx(rows * stats.ttest_rel(a, b).pvalue)
    low, high = stats.ttest_rel(a, b).confidence_interval(1 - TABLE_LEVEL / rows)
    assert verdict.interval == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        ((2.0, 2.5, 3.0), "helps"),
        ((-2.0, -2.5, -3.0), "hurts"),
        ((0.1, 5.0, 0.1), "no clear difference"),
        ((4.0, 5.0, -0.1), "no clear difference"),
        ((7.0,), "one seed: no verdict"),
        ((5.0, 5.5), "2 seeds: no verdict"),
        ((5.0, 5.0, 5.0), "equal gains: no verdict"),
        ((0.0, 0.0, 0.0), "equal gains: no verdict"),
        ((5.0, np.nan, 5.1), "a score is missing: no verdict"),
    ],
)
def test_words_of_a_verdict_on_one_row(gain: tuple[float, ...], text: str) -> None:
    (verdict,) = judge_gains([np.array(gain)])
    assert verdict.text == text
    assert (verdict.interval is None) == (verdict.p_value is None) == ("no verdict" in text)


def test_verdict_helps_exactly_where_the_interval_leaves_out_zero() -> None:
    rng = np.random.default_rng(2)
    for table in rng.normal(1.0, 1.0, (300, 2, 3)):
        for verdict in judge_gains(list(table)):
            assert verdict.interval is not None
            assert verdict.p_value is not None
            low, high = verdict.interval
            assert verdict.effect == ("helps" if low > 0 else "hurts" if high < 0 else "none")
            assert (verdict.effect != "none") == (verdict.p_value < TABLE_LEVEL)


def test_rows_that_cannot_be_tested_do_not_widen_the_intervals_of_the_others() -> None:
    tested, alone = np.array([2.0, 2.5, 3.0]), np.array([1.0])
    assert judge_gains([tested, alone])[0] == judge_gains([tested])[0]


def test_more_rows_widen_the_intervals() -> None:
    gain = np.array([2.0, 2.5, 3.2])
    one, two = judge_gains([gain])[0].interval, judge_gains([gain, gain])[0].interval
    assert one is not None
    assert two is not None
    assert two[0] < one[0] < one[1] < two[1]

"""Verdicts: a paired t test for each row of a table, corrected for its rows."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from firstlight.pipeline.stages.verdicts import TABLE_LEVEL, compute_intervals, judge_gains

NUM_TABLES, NUM_JUDGED_TABLES = 20_000, 200
# The standard error of the share of wrong tables in a simulation, if `TABLE_LEVEL` is the true one.
STANDARD_ERROR = float(np.sqrt(TABLE_LEVEL * (1 - TABLE_LEVEL) / NUM_TABLES))
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _draw_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(0.9, 0.02, shape)


def _draw_heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(0.9 + 0.01 * rng.standard_t(3, shape))


def _draw_accuracies_of_sixty_images(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.binomial(60, 0.9, shape) / 60


def _share_with_a_verdict(gains: np.ndarray) -> float:
    """Returns the share of (tables, rows, seeds) tables that have a verdict on any row.

    All tables are judged at once by what judges each row, and some of them one by one by what a run calls.
    """
    low, high, _ = compute_intervals(gains, gains.shape[1])
    # Rows whose gains are equal for all seeds have no test, and no verdict.
    told = ((low > 0) | (high < 0)) & (gains.std(-1, ddof=1) > 1e-7)
    for k in range(0, len(gains), len(gains) // NUM_JUDGED_TABLES):
        assert [verdict.effect != "none" for verdict in judge_gains(list(gains[k]))] == told[k].tolist()
    return float(told.any(-1).mean())


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
@pytest.mark.parametrize(("seeds", "rows"), [(3, 1), (3, 4), (5, 3), (5, 12)])
@pytest.mark.parametrize("draw", [_draw_normal, _draw_heavy_tailed, _draw_accuracies_of_sixty_images])
def test_at_most_five_percent_of_tables_without_effect_have_a_verdict(draw: Draw, seeds: int, rows: int) -> None:
    """Both arms are drawn alike. The bound allows three standard errors of the simulation."""
    rng = np.random.default_rng(0)
    shape = (NUM_TABLES, rows, seeds)
    wrong = _share_with_a_verdict(100 * (draw(rng, shape) - draw(rng, shape)))
    assert wrong <= TABLE_LEVEL + 3 * STANDARD_ERROR
    if draw is _draw_normal and rows == 1:
        assert wrong >= TABLE_LEVEL - 3 * STANDARD_ERROR


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
@pytest.mark.parametrize("draw", [_draw_normal, _draw_heavy_tailed, _draw_accuracies_of_sixty_images])
@pytest.mark.parametrize(("seeds", "measures"), [(3, 1), (3, 3), (5, 6)])
def test_pairs_of_three_arms_alike_have_a_verdict_in_at_most_five_percent_of_tables(
    draw: Draw, seeds: int, measures: int
) -> None:
    """The three gains of a measure depend on each other: the last is the difference of the others."""
    rng = np.random.default_rng(3)
    pretrained, given, random = (100 * draw(rng, (NUM_TABLES, measures, seeds)) for _ in range(3))
    gains = np.concatenate([pretrained - given, pretrained - random, given - random], 1)
    wrong = _share_with_a_verdict(gains)
    assert wrong <= TABLE_LEVEL + 3 * STANDARD_ERROR
    # Too many tables would be wrong with a third of the correction, as if a measure were one row.
    if draw is _draw_normal:
        low, high, _ = compute_intervals(gains, measures)
        assert float(((low > 0) | (high < 0)).any(-1).mean()) > TABLE_LEVEL + 3 * STANDARD_ERROR


def test_intervals_of_a_table_cover_the_true_gains_together() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([0.0, 3.0, -5.0])
    low, high, _ = compute_intervals(truth[:, None] + rng.normal(0, 2, (NUM_TABLES, 3, 3)), 3)
    covered = ((low <= truth) & (truth <= high)).all(-1).mean()
    assert covered == pytest.approx(1 - TABLE_LEVEL, abs=0.008)


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
    rng, seen = np.random.default_rng(2), []
    for table in rng.normal(1.0, 1.0, (300, 2, 3)):
        for verdict in judge_gains(list(table)):
            seen.append(verdict.effect)
            assert verdict.interval is not None
            assert verdict.p_value is not None
            low, high = verdict.interval
            assert verdict.effect == ("helps" if low > 0 else "hurts" if high < 0 else "none")
            assert (verdict.effect != "none") == (verdict.p_value < TABLE_LEVEL)
    assert len(seen) == 600
    assert set(seen) == {"helps", "hurts", "none"}


def test_rows_that_cannot_be_tested_do_not_widen_the_intervals_of_the_others() -> None:
    tested, alone = np.array([2.0, 2.5, 3.0]), np.array([1.0])
    assert judge_gains([tested, alone])[0] == judge_gains([tested])[0]


def test_more_rows_widen_the_intervals() -> None:
    gain = np.array([2.0, 2.5, 3.2])
    one, two = judge_gains([gain])[0].interval, judge_gains([gain, gain])[0].interval
    assert one is not None
    assert two is not None
    assert two[0] < one[0] < one[1] < two[1]

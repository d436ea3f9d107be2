"""Verdicts on pretraining: a paired t test over the seeds for each row of a table, corrected for the number of rows.

A row compares two arms. Its null hypothesis is that their mean scores over seeds are the same. Where it holds in every
row, a table has a wrong verdict with a probability of at most `TABLE_LEVEL` (Bonferroni, so for any dependence between
the rows). The intervals hold for all rows of a table together with a probability of 1 - `TABLE_LEVEL`; a verdict is
given exactly where the interval leaves out 0. Both speak of new seeds on the same images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

# The largest probability that a table without any effect has a verdict.
TABLE_LEVEL = 0.05
# A spread over fewer seeds says too little: with two, a row would need a gain of 13 times its standard error.
MIN_SEEDS = 3
# Gains whose spread is below this share of their size are equal up to rounding.
MIN_RELATIVE_SPREAD = 1e-9


@dataclass(frozen=True)
class Verdict:
    """The result of the test of one row: the effect, the interval of the mean gain, and the p value."""

    effect: Literal["helps", "hurts", "none"]
    # The lowest and highest mean gain that the seeds allow, in percent; None without a test.
    interval: tuple[float, float] | None = None
    # The p value times the number of rows of the table, at most 1; None without a test.
    p_value: float | None = None
    # Why there is no test, "" if there is one.
    reason: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        """The verdict in words: `helps`, `hurts`, `no clear difference`, or why there is none."""
        if self.reason:
            return f"{self.reason}: no verdict"
        return "no clear difference" if self.effect == "none" else self.effect


def judge_gains(gains: Sequence[np.ndarray]) -> list[Verdict]:
    """Returns the verdict on each row of a table.

    `gains`: for each row, the (seeds,) differences between the scores of its two arms, in percent.
    """
    tested = sum(_explain_no_test(gain) == "" for gain in gains)
    return [_judge_row(gain, tested) for gain in gains]


def _judge_row(gain: np.ndarray, rows: int) -> Verdict:
    if reason := _explain_no_test(gain):
        return Verdict("none", reason=reason)
    low, high, p_value = (float(number) for number in compute_intervals(gain, rows))
    if low > 0.0:
        return Verdict("helps", (low, high), p_value)
    return Verdict("hurts" if high < 0.0 else "none", (low, high), p_value)


def compute_intervals(gains: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the lower and upper bounds of the mean gains of (..., seeds) `gains`, and their p values, each (...).

    They are those of a row of a table with `rows` tested rows.
    """
    freedom = gains.shape[-1] - 1
    mean, error = gains.mean(-1), gains.std(-1, ddof=1) / np.sqrt(gains.shape[-1])
    width = error * stdtrit(freedom, 1.0 - TABLE_LEVEL / (2 * rows))
    p_value = np.minimum(1.0, rows * 2 * stdtr(freedom, -np.abs(mean) / error))
    return mean - width, mean + width, p_value


def _explain_no_test(gain: np.ndarray) -> str:
    """Returns why a row cannot be tested, "" if it can.

    Equal gains, for example of scores on few images, have no spread to compare the mean with.
    """
    if len(gain) < MIN_SEEDS:
        return "one seed" if len(gain) == 1 else f"{len(gain)} seeds"
    if not np.isfinite(gain).all():
        return "a score is missing"
    if gain.std(ddof=1) <= MIN_RELATIVE_SPREAD * max(1.0, float(np.abs(gain).max())):
        return "equal gains"
    return ""

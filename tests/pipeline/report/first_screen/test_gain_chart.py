"""Gains are placed on one axis that has 0 and all intervals on it."""

import math

import numpy as np
import pytest

from firstlight.pipeline.report.first_screen.blocks import GainBar
from firstlight.pipeline.report.first_screen.gain_chart import MAX_SHOWN_BARS, draw_gain_bar, place_bars
from firstlight.pipeline.stages.verdicts import Verdict, judge_gains


def bar(gains: list[float]) -> GainBar:
    (verdict,) = judge_gains([np.array(gains)])
    return draw_gain_bar("kNN", "evaluate, against random weights", gains, verdict, (verdict.text, "good"))


def test_bar_has_mean_interval_and_seeds_in_points() -> None:
    found = bar([7.0, 8.0, 9.0])
    assert found.low is not None
    assert found.high is not None
    assert found.middle == pytest.approx(8.0)
    assert found.low + found.high == pytest.approx(16.0)
    assert found.gain == f"+8.00 [{found.low:+.1f}, {found.high:+.1f}]"
    assert found.seeds == (7.0, 8.0, 9.0)
    assert found.verdict == "helps"


def test_one_seed_has_a_mean_and_nothing_else() -> None:
    found = bar([-3.0])
    assert (found.gain, found.middle, found.low, found.high, found.seeds) == ("-3.00", -3.0, None, None, ())
    assert found.verdict == "one seed: no verdict"


def test_places_are_linear_in_the_gain_and_inside_the_chart() -> None:
    chart = place_bars("gains", [bar([7.0, 8.0, 9.0]), bar([-4.0]), bar([20.0])])
    assert chart is not None
    first, second, third = chart.bars
    places = dict(
        zip(("first", "second", "third", "zero"), (first.middle, second.middle, third.middle, chart.zero), strict=True)
    )
    unit = (places["third"] - places["second"]) / 24
    assert places["zero"] == pytest.approx(places["second"] + 4 * unit, abs=0.02)
    assert places["first"] == pytest.approx(places["zero"] + 8 * unit, abs=0.02)
    drawn = [place for one in chart.bars for place in (one.low, one.high, one.middle, *one.seeds) if place is not None]
    assert 0 < min(drawn) < max(drawn) < 100
    ticks = {label: place for place, label in chart.ticks}
    assert ticks["0"] == chart.zero
    assert ticks["+10"] == pytest.approx(chart.zero + 10 * unit, abs=0.02)
    assert 3 <= len(ticks) <= 7


@pytest.mark.parametrize("scale", [1e-3, 0.04, 1.0, 30.0])
def test_ticks_are_round_whatever_the_size_of_the_gains(scale: float) -> None:
    chart = place_bars("gains", [bar([3.0 * scale]), bar([-scale])])
    assert chart is not None
    assert 3 <= len(chart.ticks) <= 7
    values = [float(label) for _, label in chart.ticks]
    step = values[1] - values[0]
    assert f"{step:.6g}".strip("0.") in ("1", "2", "5")
    assert values == pytest.approx([step * (round(values[0] / step) + k) for k in range(len(values))])


def test_intervals_are_cut_where_no_score_can_be() -> None:
    wide = Verdict("none", (-400.0, 500.0), 1.0)
    chart = place_bars("gains", [draw_gain_bar("kNN", "", [10.0, 20.0, 90.0], wide, ("no clear difference", "unsure"))])
    assert chart is not None
    assert chart.zero == pytest.approx(50.0)
    labels = [label for _, label in chart.ticks]
    assert (labels[0], labels[-1]) == ("-100", "+100")


def test_equal_gains_of_zero_have_an_axis() -> None:
    chart = place_bars("gains", [bar([0.0, 0.0, 0.0])])
    assert chart is not None
    assert chart.bars[0].middle == chart.zero == pytest.approx(50.0)


def test_many_bars_are_folded_and_none_is_no_chart() -> None:
    chart = place_bars("gains", [bar([float(k)]) for k in range(MAX_SHOWN_BARS + 3)])
    assert chart is not None
    assert (len(chart.bars), len(chart.more)) == (MAX_SHOWN_BARS, 3)
    assert place_bars("gains", []) is None
    assert place_bars("gains", [bar([math.nan])]) is None

"""The chart of a page's first screen: the gain of every measure with its interval, on one axis."""

import math
from collections.abc import Sequence

import numpy as np

from firstlight.pipeline.report.first_screen.blocks import EffectTone, GainBar, GainChart
from firstlight.pipeline.report.score_table import format_gain
from firstlight.pipeline.stages.verdicts import Verdict

# The bars that are shown before the reader unfolds the others.
MAX_SHOWN_BARS = 8
# No score gains or loses more points.
LARGEST_GAIN = 100.0
# The parts of the width that are left free at both ends, and the number of intervals between labels at most.
CHART_MARGIN, MAX_TICK_INTERVALS = 0.04, 6
TICK_STEPS = (1.0, 2.0, 5.0, 10.0)


def draw_gain_bar(
    measure: str, remark: str, gains: Sequence[float] | np.ndarray, verdict: Verdict, words: tuple[str, EffectTone]
) -> GainBar:
    """Returns the bar of a measure, in points: `place_bars` gives it its place on an axis.

    `gains`: those of the seeds, in points. `words`: the verdict as it is shown, and its tone.
    """
    mean, (low, high) = float(np.mean(gains)), verdict.interval or (None, None)
    seeds = tuple(float(gain) for gain in gains) if len(gains) > 1 else ()
    return GainBar(measure, remark, format_gain(mean, verdict), *words, mean, low, high, seeds)


def place_bars(caption: str, bars: Sequence[GainBar]) -> GainChart | None:
    """Returns the chart of bars that are given in points; None if there is none, or their gains are not finite."""
    bars = [bar for bar in bars if math.isfinite(bar.middle)]
    if not bars:
        return None
    ends = [end for bar in bars for end in (bar.middle, bar.low, bar.high, *bar.seeds, 0.0) if end is not None]
    low, high = max(min(ends), -LARGEST_GAIN), min(max(ends), LARGEST_GAIN)
    if high - low < 1e-9:
        low, high = low - 1.0, high + 1.0
    margin = CHART_MARGIN * (high - low)
    start, width = low - margin, high - low + 2 * margin

    def place(value: float) -> float:
        return round(100.0 * (min(max(value, low), high) - start) / width, 2)

    placed = [
        GainBar(
            *(bar.measure, bar.remark, bar.gain, bar.verdict, bar.tone, place(bar.middle)),
            None if bar.low is None else place(bar.low),
            None if bar.high is None else place(bar.high),
            tuple(place(gain) for gain in bar.seeds),
        )
        for bar in bars
    ]
    ticks = [(place(value), _format_tick(value)) for value in _choose_ticks(low, high)]
    return GainChart(caption, placed[:MAX_SHOWN_BARS], ticks, place(0.0), placed[MAX_SHOWN_BARS:])


def _choose_ticks(low: float, high: float) -> list[float]:
    """Returns round values from `low` to `high`, 0 among them."""
    raw = (high - low) / MAX_TICK_INTERVALS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in TICK_STEPS if factor * power >= raw * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _format_tick(value: float) -> str:
    return f"{value:+.10g}" if value else "0"

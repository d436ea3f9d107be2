"""The blocks of a page's first screen: a headline, a chart of gains, and what to do next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EffectTone = Literal["", "good", "bad", "unsure"]


@dataclass(frozen=True)
class Headline:
    """The sentences that answer the reader's question: the first in large letters, the others below it."""

    text: str
    details: Sequence[str] = ()
    tone: EffectTone = ""
    kind: str = "headline"


@dataclass(frozen=True)
class GainBar:
    """The gain of one measure, as a line of a chart. All positions are in percent of the chart's width.

    `measure` and `remark` name what is compared; `gain` and `verdict` say the result in words, `tone` gives its colour.
    `low` and `high` are the ends of the interval, None where there is none; `seeds` are the gains of the seeds.
    """

    measure: str
    remark: str
    gain: str
    verdict: str
    tone: EffectTone
    middle: float
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class GainChart:
    """Gains with their intervals on one axis. `ticks`: positions in percent of the width, with their labels.

    `zero`: the position of no gain. `more`: the bars that are shown only when the reader unfolds them.
    """

    caption: str
    bars: Sequence[GainBar]
    ticks: Sequence[tuple[float, str]]
    zero: float
    more: Sequence[GainBar] = ()
    kind: str = "gains"


@dataclass(frozen=True)
class NextStep:
    """One thing to do next: what was measured, what follows from it, and the command, "" if there is none."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class NextSteps:
    """Things to do next, the most important first. `folder`: where the commands are to be entered."""

    steps: Sequence[NextStep]
    folder: str
    kind: str = "next"

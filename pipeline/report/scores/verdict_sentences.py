"""The verdicts of a table in plain sentences."""

from collections import Counter
from collections.abc import Sequence

from firstlight.pipeline.config.measures import GIVEN_ARM
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.verdicts import MIN_SEEDS, Verdict

VERDICT_PHRASES = {"helps": "helps", "hurts": "hurts", "none": "makes no clear difference"}
PLURAL_PHRASES = {"helps": "help", "hurts": "hurt", "none": "make no clear difference"}


def summarise_verdicts(rows: Sequence[ScoreRow], is_continued: bool = False) -> list[str]:
    """Returns the verdicts of a table in sentences, none if no measure has a baseline.

    They say what the pretraining is worth, what the given weights are worth, and which of the two is better.
    `is_continued`: whether the pretraining has started from the given weights.
    """
    given = [row.verdict for row in rows if row.verdict is not None and row.arm == GIVEN_ARM]
    continued = [row.verdict for row in rows if row.verdict is not None and row.continues_given]
    others = [
        row.verdict for row in rows if row.verdict is not None and row.arm != GIVEN_ARM and not row.continues_given
    ]
    if not any(_count_effects(verdicts) for verdicts in (given, continued, others)):
        first = next((verdict for verdicts in (others, given, continued) for verdict in verdicts), None)
        return [f"There is no verdict: {first.reason}; a verdict needs {MIN_SEEDS} seeds or more."] if first else []
    sentences = (
        _count_measures(
            others,
            f"Compared with {'fresh weights' if given else 'the same network without it'}, pretraining",
            VERDICT_PHRASES,
        ),
        _count_measures(given, "Compared with fresh weights, the given weights", PLURAL_PHRASES),
        _judge_against_given(continued, is_continued),
    )
    return [sentence for sentence in sentences if sentence]


def _count_effects(verdicts: Sequence[Verdict]) -> Counter[str]:
    """Returns how often each effect occurs among the verdicts with a test."""
    return Counter(verdict.effect for verdict in verdicts if not verdict.reason)


def _count_measures(verdicts: Sequence[Verdict], subject: str, phrases: dict[str, str]) -> str:
    counts = _count_effects(verdicts)
    parts = [f"{does} in {counts[effect]}" for effect, does in phrases.items() if counts[effect]]
    return f"{subject} {', '.join(parts)} of {counts.total()} measures." if parts else ""


def _judge_against_given(verdicts: Sequence[Verdict], is_continued: bool) -> str:
    """Returns whether pretraining was worth more than the given weights as they came, "" if nothing was tested."""
    counts = _count_effects(verdicts)
    number, helps, hurts = counts.total(), counts["helps"], counts["hurts"]
    if not number:
        return ""
    subject = "Continued pretraining" if is_continued else "Pretraining that began from other weights"
    measures = f"{number} measure{'s' if number > 1 else ''}"
    found = f"{subject} is clearly better than the given weights in {helps or 'none'} of {measures}"
    worse = f", and clearly worse in {hurts or 'none'}"
    if not helps:
        # Without a clear loss, more seeds might still show a gain.
        limit = worse if hurts else ", as far as these seeds can tell"
        return f"{found}{limit}: the given weights are better left alone."
    if not hurts:
        return f"{found}{worse}: it was worth {'continuing' if is_continued else 'the pretraining'}."
    return f"{found}{worse}: which weights are better depends on the measure."

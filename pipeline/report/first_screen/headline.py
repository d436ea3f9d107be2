"""The headline of a run: whether pretraining helped, by how much, against what, and on how many seeds, in sentences.

Every sentence is about the verdicts of the table, which are those of paired t tests. The measure with the largest gain
is named together with that with the smallest, so that none is chosen for its result.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from firstlight.pipeline.config.measures import GIVEN_ARM, WEIGHTS_TITLES, is_pretrained_arm
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.first_screen.blocks import EffectTone, Headline
from firstlight.pipeline.report.score_table import format_spread
from firstlight.pipeline.stages.score_rows import ARM_LABELS, ScoreRow
from firstlight.pipeline.stages.stage_kind import SHARE_SCALE
from firstlight.pipeline.stages.verdicts import TABLE_LEVEL
from firstlight.pipeline.terminal import format_count

EFFECT_TONES: dict[str, EffectTone] = {"helps": "good", "hurts": "bad"}
NO_DIFFERENCE = "makes no clear difference"


@dataclass(frozen=True)
class _Question:
    """Rows of a table that answer one question, with the words of the answer by effect."""

    rows: Sequence[ScoreRow]
    subject: str
    phrases: dict[str, str]
    pronoun: str = "It"


def compose_headline(recipe: Recipe, rows: Sequence[ScoreRow]) -> Headline:
    """Returns the headline of a table of scores.

    Where a pretraining stands beside given weights, the first question is which of the two is better.
    """
    answers = [(_answer_question(one), _find_tone(one.rows)) for one in _list_questions(recipe, rows) if one.rows]
    if not answers:
        return _describe_uncompared(recipe, rows)
    (first, *details), tone = answers[0]
    return Headline(first, (*details, *(sentence for sentences, _ in answers[1:] for sentence in sentences)), tone)


def continues_given_weights(recipe: Recipe) -> bool:
    """Returns True if a pretraining starts from the weights that the recipe names."""
    made = [recipe.encoder_source(name) for name, stage in recipe.stages.items() if stage.makes_encoder]
    return any(source is not None and source.is_given for source in made)


def _list_questions(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[_Question]:
    judged = [row for row in rows if row.verdict is not None]
    continued = [row for row in judged if row.continues_given]
    given = [row for row in judged if row.arm == GIVEN_ARM]
    others = [row for row in judged if is_pretrained_arm(row.arm) and not row.continues_given]
    subject = "Continued pretraining" if continues_given_weights(recipe) else "Pretraining from other weights"
    beside = {
        "helps": "is better than the given weights",
        "hurts": "is worse than the given weights",
        "none": f"{NO_DIFFERENCE} to the given weights",
    }
    fresh = {"helps": "helps", "hurts": "hurts", "none": NO_DIFFERENCE}
    plural = {"helps": "help", "hurts": "hurt", "none": "make no clear difference"}
    return [
        _Question(continued, subject, beside),
        _Question(given, "The given weights", plural, "They"),
        _Question(others, "Pretraining", fresh),
    ]


def _find_effect(row: ScoreRow) -> str:
    """Returns the effect of a row, "" where nothing was tested."""
    return "" if row.verdict is None or row.verdict.reason else row.verdict.effect


def _find_tone(rows: Sequence[ScoreRow]) -> EffectTone:
    """Returns the tone of the rows' common effect; that of no clear answer where they differ."""
    effects = {_find_effect(row) for row in rows}
    return EFFECT_TONES.get(effects.pop(), "unsure") if len(effects) == 1 else "unsure"


def _rank_rows(rows: Sequence[ScoreRow], effect: str) -> list[ScoreRow]:
    """Returns the rows in the order of their mean gain: the largest first, or for `hurts` the largest loss."""
    return sorted(rows, key=lambda row: float(row.gain.mean()), reverse=effect != "hurts")


def _answer_question(asked: _Question) -> list[str]:
    """Returns a sentence for each effect that occurs, the most frequent first, and one about what was not tested."""
    tested = [row for row in asked.rows if _find_effect(row)]
    if not tested:
        return _describe_untested(asked)
    counts = Counter(map(_find_effect, tested)).most_common()
    sentences: list[str] = []
    for effect, count in counts:
        shown = _rank_rows([row for row in tested if _find_effect(row) == effect], effect)
        subject = asked.pronoun if sentences else asked.subject
        where = _count_measures_of(count, len(tested), effect)
        most = _describe_gain(shown[0], asked.rows)
        link = " in" if not where else f"; the {_name_largest(shown)}" if effect == "none" else ", most in"
        sentences.append(f"{subject} {asked.phrases[effect]}{where}{link} {most}.")
        if len(counts) == 1 and count > 1:
            least = f"The {_name_smallest(shown)}" if effect == "none" else "Least in"
            sentences.append(f"{least} {_describe_gain(shown[-1], asked.rows)}.")
    untested = [row for row in asked.rows if not _find_effect(row)]
    if untested:
        reasons = dict.fromkeys(row.verdict.reason for row in untested if row.verdict is not None)
        sentences.append(f"There is no verdict in {format_count(len(untested), 'measure')} more: {', '.join(reasons)}.")
    return sentences


def _count_measures_of(count: int, total: int, effect: str) -> str:
    """Returns in how many measures an effect was found, "" where there is one measure."""
    if total == 1:
        return ""
    if count < total:
        return f" in {count} of {total} measures"
    if effect == "none":
        return f" in any of {total} measures"
    return " in both measures" if total == 2 else f" in all {total} measures"


def _name_largest(ranked: Sequence[ScoreRow]) -> str:
    return "largest gain is in" if ranked[0].gain.mean() >= 0.0 else "smallest loss is in"


def _name_smallest(ranked: Sequence[ScoreRow]) -> str:
    return "smallest gain is in" if ranked[-1].gain.mean() >= 0.0 else "largest loss is in"


def _describe_untested(asked: _Question) -> list[str]:
    """Returns why there is no verdict, with the numbers that there are."""
    reasons = dict.fromkeys(row.verdict.reason for row in asked.rows if row.verdict is not None)
    start = f"There is no verdict on {asked.subject[0].lower()}{asked.subject[1:]} ({', '.join(reasons)})"
    ranked = _rank_rows([row for row in asked.rows if row.is_scored], "none")
    if not ranked:
        return [f"{start}."]
    sentences = [f"{start}; in {_describe_gain(ranked[0], asked.rows)}."]
    if len(ranked) > 1:
        sentences = [
            f"{start}; the {_name_largest(ranked)} {_describe_gain(ranked[0], asked.rows)}.",
            f"The {_name_smallest(ranked)} {_describe_gain(ranked[-1], asked.rows)}.",
        ]
    return sentences


def name_compared_measure(row: ScoreRow, beside: Sequence[ScoreRow]) -> str:
    """Returns what sentences call the measure of a row, with its stage where other rows have the same measure."""
    label, arm = row.label or row.measure, ARM_LABELS.get(row.arm, "" if row.arm == GIVEN_ARM else row.arm)
    named = f"{label}, {arm}" if arm else label
    twins = [one for one in beside if (one.label or one.measure, one.arm) == (label, row.arm)]
    return f"{named} ({row.stage})" if len(twins) > 1 else named


def _describe_gain(row: ScoreRow, beside: Sequence[ScoreRow]) -> str:
    """Returns the scores of a row with its gain, its interval and the number of seeds, as the end of a sentence."""
    own, other = (_format_mean_score(row, scores) for scores in (row.pretrained, row.baseline))
    baselines = {"scratch": "from scratch", WEIGHTS_TITLES[GIVEN_ARM]: f"with the {WEIGHTS_TITLES[GIVEN_ARM]}"}
    against = baselines.get(row.against, f"with {row.against}")
    gain, found = f"{row.gain.mean():+.1f} points", row.verdict
    if found is not None and found.interval is not None:
        low, high = found.interval
        seeds = format_count(len(row.pretrained), "seed")
        gain += f" ({100 * (1 - TABLE_LEVEL):g} % interval {low:+.1f} to {high:+.1f}, {seeds})"
    return f"{name_compared_measure(row, beside)}: {own} against {other} {against}, {gain}"


def _format_mean_score(row: ScoreRow, scores: Sequence[float]) -> str:
    return f"{row.scale * sum(scores) / len(scores):.1f}{' %' if row.scale == SHARE_SCALE else ''}"


def _describe_uncompared(recipe: Recipe, rows: Sequence[ScoreRow]) -> Headline:
    """Returns the headline of a run without a comparison: what it has, and why nothing says whether it helped."""
    if rows:
        scores = ", ".join(f"{name_compared_measure(row, rows)} {_format_own_scores(row)}" for row in rows[:3])
        return Headline("There are scores, and nothing to compare them with.", (f"On test images: {scores}.",))
    if not recipe.score_test:
        return Headline("The test images were left alone: nothing says yet whether pretraining helped.")
    if any(not measure.only_if_expected for stage in recipe.stages.values() for measure in stage.measures):
        return Headline("Nothing is measured yet.")
    return Headline("Nothing says whether pretraining helped: no stage scores what was learned.")


def _format_own_scores(row: ScoreRow) -> str:
    return format_spread(row.pretrained, row.scale) + (" %" if row.scale == SHARE_SCALE else "")

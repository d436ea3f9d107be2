"""The table at the end of a run: scores with and without pretraining over seeds, verdicts, and the paper's numbers.

Where given weights stand beside pretrained ones there are two tables: the scores, with a column for each arm, and the
comparisons of two arms each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from firstlight.pipeline.config.measures import GIVEN_ARM, WEIGHTS_TITLES
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schemas.paper_results import ExpectedResult
from firstlight.pipeline.report.scores.arm_scores import (
    ARM_WORDS,
    ArmScores,
    arm_columns,
    describe_comparison,
    group_by_measure,
    has_arm_columns,
)
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.verdicts import MIN_SEEDS, TABLE_LEVEL, Verdict

# The cell of scores that do not exist, as the test images show fewer classes than a score needs.
NO_SCORE = "no score"
# The headings of a table that compares the given weights alone, without any pretraining.
GIVEN_HEADINGS = {"pretrained": "given", "pretraining": "verdict"}


def _is_given_alone(rows: Sequence[ScoreRow]) -> bool:
    return {row.arm for row in rows if row.baseline} == {GIVEN_ARM}


def find_paper_result(recipe: Recipe, row: ScoreRow) -> ExpectedResult | None:
    """Returns the result of the paper that `row` measures, None if the recipe has none."""
    same = (e for e in recipe.expected if (e.stage, e.measure, e.arm) == (row.stage, row.key, row.arm))
    return None if row.is_beside else next(same, None)


def table_facts(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """Returns the rows of a table as plain JSON types, as `score_facts`.

    Where given weights are compared, each row also has its two arms, and the label that its measure has in all rows.
    """
    facts = [score_facts(recipe, row) for row in rows]
    if not any(GIVEN_ARM in (row.arm, row.baseline_arm) for row in rows):
        return facts
    arms = [{"arm": row.arm, "baseline_arm": row.baseline_arm, "label": row.label} for row in rows]
    return [one | its for one, its in zip(facts, arms, strict=True)]


def score_facts(recipe: Recipe, row: ScoreRow) -> dict[str, Any]:
    """Returns a row as plain JSON types, with the paper's number and the difference from it if the recipe has one.

    Scores are as measured, such as 0.5; gains and their interval, the paper's number and the difference from it are in
    the unit of the table, such as 50.
    """
    plain: dict[str, Any] = {
        "stage": row.stage,
        "measure": row.measure,
        "pretrained": _without_nan(row.pretrained),
        "baseline": _without_nan(row.baseline),
        "against": row.against,
    }
    if row.verdict is not None:
        plain |= {"gain": float(row.gain.mean()) if row.is_scored else None, "verdict": row.verdict.text}
        plain |= {"interval": row.verdict.interval, "p_value": row.verdict.p_value}
    published = find_paper_result(recipe, row)
    if published is None:
        return plain
    return plain | {
        "paper": published.paper,
        "paper_baseline": published.against,
        "above_paper": row.mean - published.paper if row.is_scored else None,
        "source": published.source,
    }


def _without_nan(scores: Sequence[float]) -> list[float | None]:
    return [score if np.isfinite(score) else None for score in scores]


def gain_metrics(row: ScoreRow) -> dict[str, float]:
    """Returns the mean gain of a row with a baseline, in percent, and if it was tested, its interval and p value.

    There are none of a row without scores.
    """
    if not row.is_scored:
        return {}
    found = {"mean_gain_percent": float(row.gain.mean())}
    if row.verdict is not None and row.verdict.interval is not None and row.verdict.p_value is not None:
        low, high = row.verdict.interval
        found |= {"gain_low_percent": low, "gain_high_percent": high, "gain_p_value": row.verdict.p_value}
    return found


def format_spread(values: Sequence[float] | np.ndarray, scale: float = 100.0) -> str:
    """Returns the mean of scores over seeds, and their standard deviation if there are several."""
    scaled = scale * np.asarray(values)
    if not np.isfinite(scaled).all():
        return NO_SCORE
    return f"{scaled.mean():.2f} ± {scaled.std(ddof=1):.2f}" if len(scaled) > 1 else f"{scaled.mean():.2f}"


def list_score_lines(rows: Sequence[ScoreRow]) -> list[str]:
    """Returns the scores of the rows in lines, without verdicts, which depend on the other rows of the table.

    There is one line for each row, or for each measure where given weights stand beside pretrained ones.
    """
    if not has_arm_columns(rows):
        return [describe_scores(row) for row in rows]
    return [_describe_arm_scores(scores) for scores in group_by_measure(rows)]


def _describe_arm_scores(scores: ArmScores) -> str:
    first, *others = scores.arms
    spreads = {arm: format_spread(values, scores.scale) for arm, values in scores.arms.items()}
    start = spreads[first] if first == "pretrained" else f"{ARM_WORDS.get(first, first)} {spreads[first]}"
    rest = (f"{WEIGHTS_TITLES.get(arm) or ARM_WORDS.get(arm, arm)} {spreads[arm]}" for arm in others)
    return f"{scores.label}: {', '.join((start, *rest))}"


def describe_scores(row: ScoreRow) -> str:
    """Returns the scores of a row in a line, without a verdict, which depends on the other rows of the table."""
    scores = f"{row.measure}: {format_spread(row.pretrained, row.scale)}"
    return f"{scores}, {row.against} {format_spread(row.baseline, row.scale)}" if row.baseline else scores


def format_gain(mean: float, verdict: Verdict) -> str:
    """Returns a mean gain in percent with the interval of its verdict, if it has one; "" where a score is missing."""
    if not np.isfinite(mean):
        return ""
    if verdict.interval is None:
        return f"{mean:+.2f}"
    low, high = verdict.interval
    return f"{mean:+.2f} [{low:+.1f}, {high:+.1f}]"


GAIN_STYLES = {"helps": "green", "hurts": "red"}


def score_cells(recipe: Recipe, row: ScoreRow) -> dict[str, str]:
    """Returns the cells of a row by heading, "" for those without a value.

    Scores are mean ± standard deviation over seeds; `gain` is the mean and, in brackets, the interval of its verdict.
    `paper` has the paper's number, and in brackets that of its baseline; `difference` is the mean minus the paper's
    number.
    """
    found = {"stage": row.stage, "measure": row.measure, "pretrained": format_spread(row.pretrained, row.scale)}
    found |= dict.fromkeys(("without", "baseline", "gain", "pretraining", "paper", "difference"), "")
    if row.verdict is not None:
        found |= {
            "without": row.against,
            "baseline": format_spread(row.baseline, row.scale),
            "gain": format_gain(float(row.gain.mean()), row.verdict),
            "pretraining": row.verdict.text,
        }
    if (published := find_paper_result(recipe, row)) is not None:
        found["paper"] = f"{published.paper:g}" + ("" if published.against is None else f" ({published.against:g})")
        found["difference"] = f"{row.mean - published.paper:+.2f}" if row.is_scored else ""
    return found


def arm_cells(columns: Sequence[tuple[str, tuple[str, ...]]], scores: ArmScores) -> list[str]:
    """Returns the cells of a measure in `arm_columns`, "" for those that it does not have."""
    found = (next((arm for arm in arms if arm in scores.arms), None) for _, arms in columns)
    return ["" if arm is None else format_spread(scores.arms[arm], scores.scale) for arm in found]


def score_headings(recipe: Recipe) -> tuple[str, ...]:
    """Returns the headings of the columns of the table."""
    paper = ("paper", "difference") if recipe.expected else ()
    return ("stage", "measure", "pretrained", "without", "baseline", "gain", "pretraining", *paper)


def score_title(recipe: Recipe) -> str:
    return _title_scores(recipe) + _title_interval(recipe)


def _title_scores(recipe: Recipe) -> str:
    return f"test scores (%), {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}"


def _title_interval(recipe: Recipe) -> str:
    return f"; [{100 * (1 - TABLE_LEVEL):g} % interval of the gain]" if len(recipe.seeds) >= MIN_SEEDS else ""


def arm_titles(recipe: Recipe) -> tuple[str, str]:
    """Returns the titles of the table of scores with a column for each arm, and of that of the comparisons."""
    return _title_scores(recipe), f"comparisons{_title_interval(recipe)}"


def table_headings(recipe: Recipe, rows: Sequence[ScoreRow]) -> dict[str, str]:
    """Returns the headings of the columns of the one table, as they are shown."""
    shown = GIVEN_HEADINGS if _is_given_alone(rows) else {}
    return {heading: shown.get(heading, heading) for heading in score_headings(recipe)}


def table_cells(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[dict[str, str]]:
    """Returns the cells of each row of the one table by heading, as `score_cells`."""
    labels = [row.label if _is_given_alone(rows) and row.label else row.measure for row in rows]
    return [score_cells(recipe, row) | {"measure": label} for row, label in zip(rows, labels, strict=True)]


def list_compared_rows(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Returns the rows that the table of comparisons has: those with a baseline, or with a number of the paper."""
    return [row for row in rows if row.baseline or find_paper_result(recipe, row) is not None]


def make_score_tables(recipe: Recipe, rows: Sequence[ScoreRow]) -> Group:
    """Returns what the terminal shows: the one table, or those of the scores and of the comparisons."""
    if not has_arm_columns(rows):
        return Group(make_score_table(recipe, rows))
    return Group(_make_arm_table(recipe, rows), _make_comparison_table(recipe, rows))


def make_score_table(recipe: Recipe, rows: Sequence[ScoreRow]) -> Table:
    """Returns the one table of the terminal, with a line for each row."""
    table = Table(title=escape(f"{recipe.name}: {score_title(recipe)}"), title_justify="left")
    headings = table_headings(recipe, rows)
    for heading, title in headings.items():
        left = heading in ("stage", "measure", "without", "pretraining")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for row, row_cells in zip(rows, table_cells(recipe, rows), strict=True):
        texts = {heading: escape(text) for heading, text in row_cells.items()} | {"pretraining": _style_verdict(row)}
        table.add_row(*(texts[heading] for heading in headings))
    return table


def _style_verdict(row: ScoreRow) -> str:
    """Returns the verdict of a row with the markup of its colour, "" if there is none."""
    if row.verdict is None:
        return ""
    return f"[{GAIN_STYLES.get(row.verdict.effect, 'yellow')}]{row.verdict.text}[/]"


def _make_arm_table(recipe: Recipe, rows: Sequence[ScoreRow]) -> Table:
    """Returns the table of the scores. A heading of two words has two lines, so that the table fits 80 columns."""
    columns = arm_columns(rows)
    table = Table(title=escape(f"{recipe.name}: {arm_titles(recipe)[0]}"), title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("measure")
    for heading, _ in columns:
        table.add_column(heading.replace(" or ", " or\n"), justify="right", no_wrap=True)
    for scores in group_by_measure(rows):
        table.add_row(escape(scores.stage), escape(scores.label), *arm_cells(columns, scores))
    return table


def _make_comparison_table(recipe: Recipe, rows: Sequence[ScoreRow]) -> Table:
    """Returns the table of the comparisons. Stage and measure have lines of their own, so that it fits 80 columns."""
    table = Table(title=escape(arm_titles(recipe)[1]), title_justify="left")
    paper = ("paper", "difference") if recipe.expected else ()
    table.add_column("comparison")
    for heading in ("gain", *paper):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    above = ""
    for row in list_compared_rows(recipe, rows):
        if (measure := f"{row.stage}: {row.label or row.measure}") != above:
            table.add_section()
            table.add_row(f"[bold]{escape(measure)}[/]")
            above = measure
        cells = score_cells(recipe, row)
        texts = [escape(cells[heading]) for heading in ("gain", *paper)]
        table.add_row(f"  {describe_comparison(row)}", *texts, _style_verdict(row))
    return table

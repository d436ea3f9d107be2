"""The table at the end of a run: scores with and without pretraining over seeds, verdicts, and the paper's numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from firstlight.pipeline.config.recipe import ExpectedResult, Recipe
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.verdicts import MIN_SEEDS, TABLE_LEVEL, Verdict

# The cell of scores that do not exist, as the test images show fewer classes than a score needs.
NO_SCORE = "no score"


def find_paper_result(recipe: Recipe, row: ScoreRow) -> ExpectedResult | None:
    """Returns the result of the paper that `row` measures, None if the recipe has none."""
    same = (e for e in recipe.expected if (e.stage, e.measure, e.arm) == (row.stage, row.key, row.arm))
    return next(same, None)


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


def describe_scores(row: ScoreRow) -> str:
    """Returns the scores of a row in a line, without a verdict, which depends on the other rows of the table."""
    scores = f"{row.measure}: {format_spread(row.pretrained, row.scale)}"
    return f"{scores}, {row.against} {format_spread(row.baseline, row.scale)}" if row.baseline else scores


def _format_gain(mean: float, verdict: Verdict) -> str:
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
            "gain": _format_gain(float(row.gain.mean()), row.verdict),
            "pretraining": row.verdict.text,
        }
    if (published := find_paper_result(recipe, row)) is not None:
        found["paper"] = f"{published.paper:g}" + ("" if published.against is None else f" ({published.against:g})")
        found["difference"] = f"{row.mean - published.paper:+.2f}" if row.is_scored else ""
    return found


def score_headings(recipe: Recipe) -> tuple[str, ...]:
    """Returns the headings of the columns of the table."""
    paper = ("paper", "difference") if recipe.expected else ()
    return ("stage", "measure", "pretrained", "without", "baseline", "gain", "pretraining", *paper)


def score_title(recipe: Recipe) -> str:
    interval = f"; [{100 * (1 - TABLE_LEVEL):g} % interval of the gain]" if len(recipe.seeds) >= MIN_SEEDS else ""
    return f"test scores (%), {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}{interval}"


def make_score_table(recipe: Recipe, rows: Sequence[ScoreRow]) -> Table:
    """Returns the table of the terminal, with a line for each row."""
    table = Table(title=escape(f"{recipe.name}: {score_title(recipe)}"), title_justify="left")
    for heading in score_headings(recipe):
        left = heading in ("stage", "measure", "without", "pretraining")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        row_cells = score_cells(recipe, row)
        texts = {heading: escape(text) for heading, text in row_cells.items()}
        if row.verdict is not None:
            style = GAIN_STYLES.get(row.verdict.effect, "yellow")
            texts["pretraining"] = f"[{style}]{row.verdict.text}[/]"
        table.add_row(*(texts[heading] for heading in score_headings(recipe)))
    return table

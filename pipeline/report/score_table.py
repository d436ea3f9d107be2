"""The table at the end of a run: scores with and without pretraining over seeds, a verdict, and the paper's numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from firstlight.pipeline.config.recipe import ExpectedResult, Recipe
from firstlight.pipeline.stages.score_rows import ScoreRow


def find_paper_result(recipe: Recipe, row: ScoreRow) -> ExpectedResult | None:
    """Returns the result of the paper that `row` measures, None if the recipe has none."""
    same = (e for e in recipe.expected if (e.stage, e.measure, e.arm) == (row.stage, row.key, row.arm))
    return next(same, None)


def score_facts(recipe: Recipe, row: ScoreRow) -> dict[str, Any]:
    """Returns a row as plain JSON types, with the paper's number and the difference from it if the recipe has one.

    Scores are as measured, such as 0.5; the paper's number and the difference are in the unit of the table, such as 50.
    """
    plain = {
        "stage": row.stage,
        "measure": row.measure,
        "pretrained": row.pretrained,
        "baseline": row.baseline,
        "against": row.against,
    }
    published = find_paper_result(recipe, row)
    if published is None:
        return plain
    return plain | {
        "paper": published.paper,
        "paper_baseline": published.against,
        "above_paper": row.mean - published.paper,
        "source": published.source,
    }


def _format_spread(values: Sequence[float] | np.ndarray, scale: float = 100.0) -> str:
    scaled = scale * np.asarray(values)
    return f"{scaled.mean():.2f} ± {scaled.std(ddof=1):.2f}" if len(scaled) > 1 else f"{scaled.mean():.2f}"


GAIN_STYLES = {"helps": "green", "hurts": "red"}


def score_cells(recipe: Recipe, row: ScoreRow) -> dict[str, str]:
    """Returns the cells of a row by heading, "" for those without a value.

    Scores are mean ± standard deviation over seeds. `paper` has the paper's number, and in brackets that of its
    baseline; `difference` is the mean minus the paper's number.
    """
    found = {"stage": row.stage, "measure": row.measure, "pretrained": _format_spread(row.pretrained, row.scale)}
    found |= dict.fromkeys(("without", "baseline", "gain", "pretraining", "paper", "difference"), "")
    if row.baseline:
        sign = "+" if row.gain.mean() >= 0 else ""
        found |= {
            "without": row.against,
            "baseline": _format_spread(row.baseline),
            "gain": sign + _format_spread(row.gain / 100),
            "pretraining": row.verdict,
        }
    if (published := find_paper_result(recipe, row)) is not None:
        found["paper"] = f"{published.paper:g}" + ("" if published.against is None else f" ({published.against:g})")
        found["difference"] = f"{row.mean - published.paper:+.2f}"
    return found


def score_headings(recipe: Recipe) -> tuple[str, ...]:
    """Returns the headings of the columns of the table."""
    paper = ("paper", "difference") if recipe.expected else ()
    return ("stage", "measure", "pretrained", "without", "baseline", "gain", "pretraining", *paper)


def score_title(recipe: Recipe) -> str:
    return f"test scores (%), {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}"


def make_score_table(recipe: Recipe, rows: Sequence[ScoreRow]) -> Table:
    """Returns the table of the terminal, with a line for each row."""
    table = Table(title=f"{recipe.name}: {score_title(recipe)}", title_justify="left")
    for heading in score_headings(recipe):
        left = heading in ("stage", "measure", "without", "pretraining")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        row_cells = score_cells(recipe, row)
        if row.baseline:
            row_cells["pretraining"] = f"[{GAIN_STYLES.get(row.verdict, 'yellow')}]{row.verdict}[/]"
        table.add_row(*(row_cells[heading] for heading in score_headings(recipe)))
    return table

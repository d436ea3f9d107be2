"""The table at the end: pretrained beside the same network without, over seeds, whether it helped, and what the paper reports."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from firstlight.pipeline.config.recipe import ExpectedResult, Recipe
from firstlight.pipeline.stages.score_rows import ScoreRow


def in_paper(recipe: Recipe, row: ScoreRow) -> ExpectedResult | None:
    """The number of the paper that `row` measures."""
    same = (e for e in recipe.expected if (e.stage, e.measure, e.arm) == (row.stage, row.key, row.arm))
    return next(same, None)


def facts(recipe: Recipe, row: ScoreRow) -> dict[str, Any]:
    """A row as plain JSON types; the paper's number and how far the mean is above it, where it has one, as they are shown."""
    plain = {
        "stage": row.stage,
        "measure": row.measure,
        "pretrained": row.pretrained,
        "baseline": row.baseline,
        "against": row.against,
    }
    said = in_paper(recipe, row)
    if said is None:
        return plain
    return plain | {
        "paper": said.paper,
        "paper_baseline": said.against,
        "above_paper": row.mean - said.paper,
        "source": said.source,
    }


def _spread(values: Sequence[float] | np.ndarray, scale: float = 100.0) -> str:
    shown = scale * np.asarray(values)
    return f"{shown.mean():.2f} ± {shown.std(ddof=1):.2f}" if len(shown) > 1 else f"{shown.mean():.2f}"


STYLES = {"helps": "green", "hurts": "red"}


def cells(recipe: Recipe, row: ScoreRow) -> dict[str, str]:
    """What the table shows of a row, by heading; "" where it has nothing to show. Mean ± standard deviation over seeds; of the paper its number, in
    brackets that of its baseline, and the difference from it."""
    shown = {"stage": row.stage, "measure": row.measure, "pretrained": _spread(row.pretrained, row.scale)}
    shown |= dict.fromkeys(("without", "baseline", "gain", "pretraining", "paper", "difference"), "")
    if row.baseline:
        sign = "+" if row.gain.mean() >= 0 else ""
        shown |= {
            "without": row.against,
            "baseline": _spread(row.baseline),
            "gain": sign + _spread(row.gain / 100),
            "pretraining": row.verdict,
        }
    if (said := in_paper(recipe, row)) is not None:
        shown["paper"] = f"{said.paper:g}" + ("" if said.against is None else f" ({said.against:g})")
        shown["difference"] = f"{row.mean - said.paper:+.2f}"
    return shown


def headings(recipe: Recipe) -> tuple[str, ...]:
    """Of the columns of the table."""
    paper = ("paper", "difference") if recipe.expected else ()
    return ("stage", "measure", "pretrained", "without", "baseline", "gain", "pretraining", *paper)


def title(recipe: Recipe) -> str:
    return f"test scores (%), {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}"


def table(recipe: Recipe, found: Sequence[ScoreRow]) -> Table:
    """A line for each row, as `cells` says."""
    out = Table(title=f"{recipe.name}: {title(recipe)}", title_justify="left")
    for heading in headings(recipe):
        left = heading in ("stage", "measure", "without", "pretraining")
        out.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in found:
        shown = cells(recipe, row)
        if row.baseline:
            shown["pretraining"] = f"[{STYLES.get(row.verdict, 'yellow')}]{row.verdict}[/]"
        out.add_row(*(shown[heading] for heading in headings(recipe)))
    return out

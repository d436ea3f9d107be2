"""The result of a run as a notebook shows it: the headline, the tables and where the report is, as a part of a page.

Colours are given only where they say something and can be read on a light and on a dark page; the rest is the
notebook's own. All texts are escaped.
"""

import html
from collections.abc import Sequence
from pathlib import Path

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.first_screen.headline import compose_headline
from firstlight.pipeline.report.html_page import Cell, Table
from firstlight.pipeline.report.page_parts import score_blocks
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.terminal import escape_text

# The colours of verdicts, by their tone.
TONE_COLOURS = {"good": "#43a047", "bad": "#e53935", "unsure": "#b58900"}
CELL_PADDING = "padding: 0.25em 0.8em 0.25em 0"


def render_result(recipe: Recipe, rows: Sequence[ScoreRow], report: Path) -> str:
    """Returns the result as HTML. The report is a link where it exists, besides its path to copy."""
    headline = compose_headline(recipe, rows)
    parts = [f'<p style="margin: 0.4em 0"><strong>{_escape(headline.text)}</strong></p>']
    parts += [f'<p style="margin: 0.2em 0">{_escape(" ".join(headline.details))}</p>'] if headline.details else []
    parts += [_render_table(block) for block in score_blocks(recipe, rows) if rows and isinstance(block, Table)]
    if report.exists():
        uri, path = html.escape(report.resolve().as_uri()), _escape(str(report))
        parts.append(f'<p style="margin: 0.4em 0">Report: <a href="{uri}" target="_blank">{path}</a></p>')
    return f'<div class="firstlight-result">{"".join(parts)}</div>'


def _render_table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col" style="{CELL_PADDING}; text-align: {_align(table, k)}">{_escape(head)}</th>'
        for k, head in enumerate(table.heads)
    )
    lines = "".join(
        f"<tr>{''.join(_render_cell(cell, _align(table, k)) for k, cell in enumerate(row))}</tr>" for row in table.rows
    )
    caption = f'<caption style="text-align: left; caption-side: top">{_escape(table.caption)}</caption>'
    return (
        '<div style="overflow-x: auto"><table style="border-collapse: collapse; width: auto">'
        f"{caption}<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _render_cell(cell: str | Cell, side: str) -> str:
    text, tone, remark = (cell.text, cell.tone, cell.remark) if isinstance(cell, Cell) else (cell, "", "")
    colour = f"; color: {TONE_COLOURS[tone]}; font-weight: bold" if tone else ""
    below = f'<br><small style="opacity: 0.75">{_escape(remark)}</small>' if remark else ""
    return f'<td style="{CELL_PADDING}; text-align: {side}{colour}">{_escape(text)}{below}</td>'


def _align(table: Table, column: int) -> str:
    return "right" if column in table.numbers else "left"


def _escape(text: str) -> str:
    return html.escape(escape_text(text))

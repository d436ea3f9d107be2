"""Printing of tables and results: formatted on a terminal, plain in a pipe."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click
from rich.console import RenderableType

from firstlight.pipeline.terminal import SafeConsole, escape_text

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe
    from firstlight.pipeline.stages.score_rows import ScoreRow

# Characters that fit every line of a view in a pipe.
PIPE_WIDTH = 1000
# Characters of a table of scores in a pipe.
RESULTS_WIDTH = 140


def echo_text(text: str, err: bool = False, nl: bool = True) -> None:
    """Prints a text as it is, but with escapes for the characters that a terminal would obey."""
    click.echo(escape_text(text), err=err, nl=nl)


def print_table_or_tsv(table: Callable[[SafeConsole], RenderableType], tsv: Callable[[], str]) -> None:
    """Prints the table on a terminal, and tab-separated lines in a pipe."""
    if sys.stdout.isatty():
        console = SafeConsole()
        console.print(table(console))
    else:
        echo_text(tsv())


def print_view(view: RenderableType) -> None:
    """Prints a view at the width of the terminal; in a pipe, no line is wrapped."""
    if sys.stdout.isatty():
        SafeConsole().print(view)
        return
    console = SafeConsole(width=PIPE_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(view)
    echo_text("\n".join(line.rstrip() for line in capture.get().split("\n")).rstrip("\n"))


def results_console() -> SafeConsole:
    """Returns the console for results, which go to stdout; progress and notes go to stderr."""
    return SafeConsole(width=None if sys.stdout.isatty() else RESULTS_WIDTH)


def print_scores(out: SafeConsole, recipe: "Recipe", rows: "Sequence[ScoreRow]") -> None:
    """Prints the tables of a recipe, and below them the headline of its report."""
    from firstlight.pipeline.report.first_screen.headline import compose_headline
    from firstlight.pipeline.report.score_table import make_score_tables

    out.print(make_score_tables(recipe, rows))
    headline = compose_headline(recipe, rows)
    out.print(" ".join((headline.text, *headline.details)), soft_wrap=True, highlight=False, markup=False)

"""Printing of tables and results: formatted on a terminal, plain in a pipe."""

import sys
from collections.abc import Callable

import click
from rich.console import Console, RenderableType

# Characters that fit every line of a view in a pipe.
PIPE_WIDTH = 1000
# Characters of a table of scores in a pipe.
RESULTS_WIDTH = 140


def print_table_or_tsv(table: Callable[[Console], RenderableType], tsv: Callable[[], str]) -> None:
    """Prints the table on a terminal, and tab-separated lines in a pipe."""
    if sys.stdout.isatty():
        console = Console()
        console.print(table(console))
    else:
        click.echo(tsv())


def print_view(view: RenderableType) -> None:
    """Prints a view at the width of the terminal; in a pipe, no line is wrapped."""
    if sys.stdout.isatty():
        Console().print(view)
        return
    console = Console(width=PIPE_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(view)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def results_console() -> Console:
    """Returns the console for results, which go to stdout; progress and notes go to stderr."""
    return Console(width=None if sys.stdout.isatty() else RESULTS_WIDTH)

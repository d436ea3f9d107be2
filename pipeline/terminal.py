"""Tables and durations as the terminal shows them, and tables as tab-separated lines for pipes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """One column of a terminal table.

    `numeric` sets it flush right; `fixed` keeps its text on one line; `min_width` counts characters.
    """

    heading: str
    numeric: bool = False
    fixed: bool = False
    min_width: int | None = None


def build_table(
    columns: Sequence[Column], rows: Iterable[Sequence[RenderableType]] = (), title: str = "", grid: bool = False
) -> Table:
    """Returns a table of the rows, with lines between its columns if `grid`. An empty row separates groups of rows."""
    look = {"box": HEAVY_HEAD} if grid else {"box": SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title or None, title_justify="left", caption_justify="left", **look)
    for column in columns:
        table.add_column(
            column.heading,
            justify="right" if column.numeric else "left",
            overflow="ellipsis" if grid else "fold",
            no_wrap=column.fixed,
            min_width=column.min_width,
        )
    for row in rows:
        table.add_row(*row)
    return table


def format_tsv(rows: Iterable[Iterable[str]]) -> str:
    """Returns a line of tab-separated cells for each row."""
    return "\n".join("\t".join(row) for row in rows)


def format_duration(seconds: float) -> str:
    """Returns hours and minutes, minutes and seconds, or seconds, with tenths below ten seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.{int(seconds < 10)}f} s"


def format_ago(seconds: float) -> str:
    """Returns e.g. "3 h ago", in the largest unit of which at least two have passed."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"

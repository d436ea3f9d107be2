"""Text, tables and durations as the terminal shows them, and tables as tab-separated lines for pipes.

Names of files, classes and runs come from outside: characters of them that a terminal or a browser would obey are shown
as escapes, such as `\\x1b` and `\\u202e`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Control characters but tabs and newlines; marks that are invisible or change the direction of the text, but for the
# joiners, which words and emoji need; separators of lines and paragraphs; halves of surrogate pairs; and tags.
UNSAFE_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def escape_text(text: str) -> str:
    """Returns the text with escapes for the characters that would not be shown as themselves. Lines stay lines."""
    return UNSAFE_CHARACTERS.sub(_escape_character, text)


def escape_line(text: str) -> str:
    """Returns the text on one line, with escapes also for tabs and newlines."""
    return escape_text(text).replace("\t", "\\t").replace("\n", "\\n")


def _escape_character(match: re.Match[str]) -> str:
    code = ord(match[0])
    width, letter = (2, "x") if code < 0x100 else (4, "u") if code < 0x10000 else (8, "U")
    return f"\\{letter}{code:0{width}x}"


class SafeConsole(Console):
    """A console that shows no character of any text that a terminal would obey. Its own colours are no text.

    All output of commands goes through it.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns the text, which may have markup, as rich does, with escapes."""
        return super().render_str(escape_text(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the parts of what is printed. Texts get their escapes before they are laid out."""
        if isinstance(renderable, Text) and UNSAFE_CHARACTERS.search(renderable.plain):
            renderable = self._escape_styled(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_text(segment.text), segment.style)

    def _escape_styled(self, text: Text) -> Text:
        """Returns a styled text with escapes, each in the style of its character."""
        out, done = text[:0], 0
        for match in UNSAFE_CHARACTERS.finditer(text.plain):
            style = text.get_style_at_offset(self, match.start())
            out.append_text(text[done : match.start()]).append(_escape_character(match), style)
            done = match.end()
        out.append_text(text[done:])
        out.end = text.end
        return out


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


def format_count(number: float, noun: str) -> str:
    """Returns a number with a noun, which is in the plural unless the number is 1."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}" + ("" if number == 1 else "s")


def format_tsv(rows: Iterable[Iterable[str]]) -> str:
    """Returns a line of tab-separated cells for each row. Tabs and newlines inside a cell become escapes."""
    return "\n".join("\t".join(map(escape_line, row)) for row in rows)


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

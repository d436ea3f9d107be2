"""The console of a call from Python: the terminal, one output of a notebook's cell that changes in place, or nothing.

A notebook knows neither cursors nor erased lines. The text that the console would write to a terminal is therefore
drawn on a screen in memory, which the cell shows, so that a bar stays one line however long it runs. It needs no
widgets.
"""

import contextlib
import contextvars
import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.terminal import SafeConsole

# The codes that a console writes besides text: the cursor goes up, a line is erased, the cursor is shown or hidden.
CURSOR_CODES = re.compile(r"(\r|\n|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])")
# The screen is as wide as bars and tables need, and as high as a table of trials may be. Longer lines wrap.
CELL_WIDTH, CELL_HEIGHT = 92, 40
# The seconds between two changes of a cell's output.
UPDATE_S = 0.2
# Colours that can be read on a light and on a dark page.
CELL_THEME = Theme(
    {
        "bar.back": "rgb(160,160,160)",
        "bar.complete": "rgb(92,107,192)",
        "bar.finished": "rgb(67,160,71)",
        "bar.pulse": "rgb(92,107,192)",
        "progress.elapsed": "none",
        "progress.remaining": "none",
        "progress.percentage": "none",
        "progress.spinner": "rgb(67,160,71)",
    }
)
CELL_STYLE = (
    "margin: 0; font-size: 0.85em; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.35; background: none"
)

# A function that takes an output by its media types, "text/html" and "text/plain".
OutputWriter = Callable[[Mapping[str, str]], None]


class CellScreen(io.TextIOBase):
    """A terminal in memory, which knows the codes that a console writes. `flush` shows it where it has changed.

    `show` is called with the whole screen, at most every `UPDATE_S` seconds; `show_rest` shows what is left.
    """

    encoding = "utf-8"

    def __init__(self, show: OutputWriter) -> None:
        self.show, self.lines, self.row = show, [""], 0
        self.shown_at, self.is_shown, self.lock = 0.0, True, threading.RLock()

    def isatty(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self.lock:
            for part in filter(None, CURSOR_CODES.split(text)):
                self._draw(part)
            self.is_shown = False
        return len(text)

    def _draw(self, part: str) -> None:
        if part == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part == "\x1b[2K":
            self.lines[self.row] = ""
        elif part.startswith("\x1b[") and part.endswith("A"):
            self.row = max(self.row - int(part[2:-1] or 1), 0)
        elif not CURSOR_CODES.fullmatch(part):
            self.lines[self.row] += part

    def flush(self) -> None:
        if time.monotonic() - self.shown_at >= UPDATE_S:
            self.show_rest()

    def show_rest(self) -> None:
        """Shows the screen if it has changed since it was shown."""
        with self.lock:
            if not self.is_shown:
                self.is_shown, self.shown_at = True, time.monotonic()
                self.show(self.render())

    def render(self) -> dict[str, str]:
        """Returns the screen as HTML and as plain text."""
        text = Text.from_ansi("\n".join(self.lines).rstrip())
        recorder = SafeConsole(record=True, file=io.StringIO(), width=CELL_WIDTH, force_jupyter=False)
        recorder.print(text, soft_wrap=True, highlight=False, end="")
        html = recorder.export_html(inline_styles=True, code_format="{code}")
        return {"text/html": f'<pre style="{CELL_STYLE}">{html}</pre>', "text/plain": text.plain}


class _CellOutput:
    """One output of the cell that runs, which every call replaces."""

    def __init__(self) -> None:
        self.handle: Any = None
        # A kernel knows the cell of an output by the context in which the cell runs. A bar is drawn by a thread of its
        # own, which has another one.
        self.context = contextvars.copy_context()

    def __call__(self, output: Mapping[str, str]) -> None:
        self.context.run(self._write, output)

    def _write(self, output: Mapping[str, str]) -> None:
        from IPython.display import display

        if self.handle is None:
            self.handle = display(dict(output), raw=True, display_id=True)
        else:
            self.handle.update(dict(output), raw=True)


def draw_console(screen: CellScreen) -> SafeConsole:
    """Returns a console that draws on the screen as on a terminal."""
    return SafeConsole(
        file=cast(IO[str], screen),
        force_terminal=True,
        force_interactive=True,
        force_jupyter=False,
        color_system="truecolor",
        theme=CELL_THEME,
        width=CELL_WIDTH,
        height=CELL_HEIGHT,
        legacy_windows=False,
    )


@contextlib.contextmanager
def open_console(given: Console | None, quiet: bool) -> Iterator[Console]:
    """Yields the console for the progress of a call: `given`, that of the notebook or of stderr, or a silent one.

    Raises:
        UserError: `quiet` is combined with a console.
    """
    if given is not None and quiet:
        raise UserError("quiet: cannot be combined with console; valid: one of them")
    if given is not None or quiet:
        yield given or SafeConsole(quiet=True)
    elif SafeConsole().is_jupyter:
        screen = CellScreen(_CellOutput())
        try:
            yield draw_console(screen)
        finally:
            screen.show_rest()
    else:
        yield SafeConsole(stderr=True)

"""The console of a call from Python: what a notebook's cell shows of bars and lines, and which console is opened."""

import io
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from rich.console import Console

from firstlight.pipeline import notebook
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.notebook import CellScreen, draw_console, open_console
from firstlight.pipeline.terminal import SafeConsole
from firstlight.pipeline.tracking.progress import ProgressCounter


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    monkeypatch.setattr(notebook, "UPDATE_S", 0.0)
    return []


def test_bar_stays_one_line_and_lines_stay_above_it(shown: list[Mapping[str, str]]) -> None:
    screen = CellScreen(shown.append)
    console = draw_console(screen)
    console.print("images: 300")
    with ProgressCounter(console, "prepare") as progress:
        for done in range(0, 301, 20):
            progress.show_count(done, 300)
            progress.progress.refresh()
            if done == 100:
                console.print("  a note")
    screen.show_rest()
    assert len(shown) > 15
    lines = shown[-1]["text/plain"].splitlines()
    assert [line.split()[0] for line in lines] == ["images:", "a", "✓"]
    assert lines[-1].startswith("✓ prepare")
    assert "300/300" in lines[-1]
    assert "images/s" in lines[-1]
    assert any("140/300" in one["text/plain"] for one in shown)
    assert max(len(one["text/plain"].splitlines()) for one in shown) == 3


def test_html_has_colours_and_escapes_markup(shown: list[Mapping[str, str]]) -> None:
    screen = CellScreen(shown.append)
    draw_console(screen).print("[green]ok[/] <b>name</b> \x1b[2K", soft_wrap=True, highlight=False)
    screen.show_rest()
    text = shown[-1]["text/html"]
    assert "&lt;b&gt;name&lt;/b&gt;" in text
    assert "<b>" not in text
    assert 'style="color: #008000' in text
    assert "\x1b" not in text
    assert shown[-1]["text/plain"] == "ok <b>name</b> \\x1b[2K"


def test_changes_of_the_screen_are_shown_rarely_and_the_last_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "UPDATE_S", 1000.0)
    shown = list[Mapping[str, str]]()
    screen = CellScreen(shown.append)
    screen.shown_at = notebook.time.monotonic()
    for k in range(50):
        screen.write(f"line {k}\n")
        screen.flush()
    assert shown == []
    screen.show_rest()
    assert shown[0]["text/plain"].endswith("line 49")
    screen.show_rest()
    assert len(shown) == 1


def test_quiet_prints_nothing_and_is_refused_beside_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    with open_console(None, quiet=True) as console:
        console.print("hello")
    assert capsys.readouterr() == ("", "")
    given = Console(file=io.StringIO())
    with open_console(given, quiet=False) as console:
        assert console is given
    with pytest.raises(UserError, match=r"^quiet: cannot be combined with console; valid: one of them$"):
        open_console(given, quiet=True).__enter__()


def test_without_a_notebook_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with open_console(None, quiet=False) as console:
        assert isinstance(console, SafeConsole)
        console.print("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_cell_has_one_output_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[tuple[str, Any]]()
    handle = types.SimpleNamespace(update=lambda data, raw: calls.append(("update", data["text/plain"])))

    def display(data: Mapping[str, str], raw: bool, display_id: bool) -> Any:
        calls.append(("display", data["text/plain"]))
        return handle

    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(notebook, "UPDATE_S", 0.0)
    monkeypatch.setattr(notebook, "SafeConsole", _in_notebook)
    with open_console(None, quiet=False) as console:
        console.print("one")
        console.print("two")
    assert calls == [("display", "one"), ("update", "one\ntwo")]


def _in_notebook(**options: Any) -> SafeConsole:
    return SafeConsole(**{"force_jupyter": True, **options})


DRAW = """
import matplotlib
import firstlight.pipeline.report.figures, firstlight.pipeline.search.figures
print(matplotlib.get_backend())
"""


def test_figures_of_reports_leave_the_backend_of_a_notebook_alone() -> None:
    """With another backend, the notebook's own figures would not be shown."""
    environment = {**os.environ, "MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", DRAW], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "svg\n"


CELL = """
from firstlight.pipeline.notebook import open_console
from firstlight.pipeline.tracking.progress import ProgressCounter
with open_console(None, quiet=False) as console, ProgressCounter(console, "prepare") as progress:
    for done in range(301):
        progress.show_count(done, 300)
        progress.progress.refresh()
    print("of a library")
"""


def test_a_kernel_shows_a_bar_in_one_output(tmp_path: Path) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, startup_timeout=300, resources=resources).execute()
    (output,) = book.cells[0].outputs
    lines = output["data"]["text/plain"].splitlines()
    assert lines[0] == "of a library"
    assert "300/300" in lines[1]
    assert len(lines) == 2
    assert output["data"]["text/html"].startswith("<pre style=")

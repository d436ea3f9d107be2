"""The output of commands on a terminal and in a pipe."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from firstlight.pipeline.cli.output import echo_text, print_scores, print_table_or_tsv, print_view, results_console
from firstlight.pipeline.terminal import SafeConsole
from tests.support import recipes
from tests.support.judged_rows import HIGH, compared, judged


def print_both(width_of: list[int]) -> None:
    def table(console: Console) -> Text:
        width_of.append(console.width)
        return Text("a table")

    print_table_or_tsv(table, lambda: "a\tb")


def test_pipe_gets_tab_separated_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_both([])
    assert capsys.readouterr().out == "a\tb\n"


def test_terminal_gets_the_table_made_for_its_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "77")
    widths: list[int] = []
    print_both(widths)
    assert widths == [77]
    assert "a table" in capsys.readouterr().out


def test_view_in_a_pipe_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_view(Text("word " * 150))
    assert capsys.readouterr().out == ("word " * 150).rstrip() + "\n"


def test_view_on_a_terminal_is_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_view(Text("word " * 150))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_results_in_a_pipe_have_space_for_the_table_of_scores() -> None:
    assert results_console().width == 140


@pytest.mark.parametrize("terminal", [False, True])
def test_names_cannot_act_on_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    name = "a\x1b[2J\u202eb\u2028c"
    print_table_or_tsv(lambda console: Text(name), lambda: name)
    print_view(Text(name))
    results_console().print(name, markup=False, highlight=False)
    echo_text(name)
    out = capsys.readouterr().out
    assert out.count(r"a\x1b[2J\u202eb\u2028c") == 4
    assert not set(out) & set("\u202e\u2028")
    assert "\x1b[2J" not in out


def test_headline_follows_the_table_of_scores(tmp_path: Path) -> None:
    text = io.StringIO()
    print_scores(SafeConsole(file=text, width=140), recipes.recipe(tmp_path, seeds=[0, 1, 2]), judged(compared(HIGH)))
    *table, headline = text.getvalue().splitlines()
    assert "kNN (k=20)" in "".join(table)
    assert headline == (
        "Pretraining helps in kNN (k=20): 81.0 % against 41.0 % with random weights, +40.0 points (95 % interval +37.5 "
        "to +42.5, 3 seeds)."
    )

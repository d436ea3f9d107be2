"""Tables for terminals and pipes, and durations in words."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.text import Text

from firstlight.pipeline.terminal import (
    Column,
    SafeConsole,
    build_table,
    escape_line,
    escape_text,
    format_ago,
    format_count,
    format_duration,
    format_tsv,
)
from tests.support.rendering import render_text

COLUMNS = (Column("name"), Column("count", numeric=True), Column("remark", fixed=True, min_width=12))


def test_numeric_columns_are_flush_right() -> None:
    lines = render_text(build_table(COLUMNS, [("a", "7", "x"), ("b", "1000", "y")])).splitlines()
    (seven,) = (line.index("7") for line in lines if "7" in line)
    (thousand,) = (line.index("1000") for line in lines if "1000" in line)
    assert seven == thousand + 3


def test_grid_draws_lines_between_columns_and_the_plain_look_does_not() -> None:
    row = ("a", "7", "x")
    assert "│" in render_text(build_table(COLUMNS, [row], grid=True))
    assert "│" not in render_text(build_table(COLUMNS, [row]))


def test_title_stands_above_the_table() -> None:
    assert render_text(build_table(COLUMNS, [("a", "7", "x")], "all of them")).splitlines()[0] == "all of them"


def test_empty_row_separates_groups() -> None:
    text = render_text(build_table(COLUMNS, [("a", "1", "x"), (), ("b", "2", "y")]))
    lines = [line.strip() for line in text.splitlines()]
    first = next(k for k, line in enumerate(lines) if line.startswith("a"))
    assert lines[first + 1] == ""
    assert lines[first + 2].startswith("b")


def test_only_columns_that_are_not_fixed_wrap() -> None:
    text = render_text(build_table(COLUMNS, [(Text("word " * 20), "1", "a remark of 24 characters")]), width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert "a remark of 24 characters" in text


def test_min_width_is_kept() -> None:
    heading = next(
        line for line in render_text(build_table((*COLUMNS, Column("end")))).splitlines() if "remark" in line
    )
    assert heading.index("end") - heading.index("remark") >= 12


def test_tsv_has_a_line_for_each_row() -> None:
    assert format_tsv([("a", "b"), ("c", "")]) == "a\tb\nc\t"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.3, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (90_061, "25 h 01 min"),
    ],
)
def test_durations_have_two_units_and_tenths_below_ten_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s ago"),
        (119, "119 s ago"),
        (120, "2 min ago"),
        (7199, "120 min ago"),
        (7200, "2 h ago"),
        (172_799, "48 h ago"),
        (172_800, "2 d ago"),
    ],
)
def test_times_ago_are_in_the_largest_unit_that_passed_twice(seconds: float, text: str) -> None:
    assert format_ago(seconds) == text


# A name that clears the screen, changes the title, hides its ending and rings.
HOSTILE = "a\x1b[2J\x1b]0;x\x07\u202egnp.exe\u2066\u200b\x9b\ud800.png"
SHOWN = r"a\x1b[2J\x1b]0;x\x07\u202egnp.exe\u2066\u200b\x9b\ud800.png"


def test_hostile_characters_are_shown_as_escapes() -> None:
    assert escape_text(HOSTILE) == SHOWN
    assert escape_text("\U000e0041\u2028\x7f\r") == r"\U000e0041\u2028\x7f\x0d"
    assert escape_line("a\tb\nc") == r"a\tb\nc"
    kept = "Grüße, 写真, می‌خواهم, \N{FAMILY}, tab\t and\nnewline"
    assert escape_text(kept) == kept


@given(st.text())
def test_escaped_text_has_no_control_characters(text: str) -> None:
    shown = escape_text(text)
    assert escape_text(shown) == shown
    joiners = "\u200c\u200d"
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\t\n"]
    assert not [
        c
        for c in shown
        if unicodedata.bidirectional(c) in ("RLE", "LRE", "RLO", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI")
    ]
    assert not [c for c in shown if c in "\u200e\u200f\u061c"]
    assert [c for c in text if c in joiners] == [c for c in shown if c in joiners]


def safe_console(terminal: bool) -> SafeConsole:
    look = {"force_terminal": True, "color_system": "standard"} if terminal else {}
    return SafeConsole(file=io.StringIO(), width=200, **look)


@pytest.mark.parametrize("terminal", [False, True])
def test_printed_names_do_not_control_the_terminal(terminal: bool) -> None:
    console = safe_console(terminal)
    console.print(HOSTILE, markup=False, highlight=False)
    console.print(f"[yellow]note[/] {HOSTILE}", highlight=False)
    console.print(Text.assemble((HOSTILE, "bold red"), " ok"))
    console.print(build_table((Column("name"), Column("other")), [(HOSTILE, Text(HOSTILE, "red"))], HOSTILE))
    with Progress(TextColumn("{task.description}"), console=console) as progress:
        progress.add_task(HOSTILE)
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert not set(written) & set("\x07\u202e\u2066\u200b\x9b\ud800")
    assert "\x1b[2J" not in written
    assert "\x1b]0" not in written
    assert written.count("gnp.exe") >= 6
    assert ("\x1b[" in written) == terminal, "colours of its own"


def test_escaped_text_keeps_its_styles() -> None:
    console = safe_console(True)
    console.print(Text.assemble(("a\u202eb", "red"), ("c", "green")))
    assert isinstance(console.file, io.StringIO)
    assert r"\u202e" in console.file.getvalue()
    assert console.file.getvalue().count("\x1b[31m") == 3
    assert console.file.getvalue().count("\x1b[32m") == 1


def test_tsv_cell_cannot_make_columns_or_lines() -> None:
    assert format_tsv([("a\tb", "c\nd", HOSTILE)]) == f"a\\tb\tc\\nd\t{SHOWN}"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 pairs"), (1, "1 pair"), (1200, "1,200 pairs"), (0.5, "0.5 pairs"), (1.0, "1 pair")]
)
def test_counts_have_their_plural(number: float, text: str) -> None:
    assert format_count(number, "pair") == text

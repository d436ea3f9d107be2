"""Tables for terminals and pipes, and durations in words."""

import pytest
from rich.text import Text

from firstlight.pipeline.terminal import Column, build_table, format_ago, format_duration, format_tsv
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

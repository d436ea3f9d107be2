"""The findings of the doctor as table, lines and exit code."""

import pytest

from firstlight.pipeline.cli.findings import (
    OK,
    PROBLEM,
    WARNING,
    Finding,
    findings_table,
    findings_tsv,
    raise_on_problem,
    warn_unless,
)
from firstlight.pipeline.errors import StageFailed
from tests.support.rendering import render_text

FINDINGS = [
    Finding("machine", "CPUs", "2"),
    Finding("machine", "disk", "1 GB free", WARNING, "free some space"),
    Finding("torch", "GPUs", "x " * 90, PROBLEM, "install another"),
]


def test_table_fits_the_terminal_and_puts_advice_below_the_result() -> None:
    text = render_text(findings_table(FINDINGS), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert [mark for mark in "✓!✗" if mark in text] == ["✓", "!", "✗"]
    disk = next(k for k, line in enumerate(text.splitlines()) if "1 GB free" in line)
    assert "free some space" in text.splitlines()[disk + 1]


def test_each_area_has_one_heading() -> None:
    headings = [line.strip() for line in render_text(findings_table(FINDINGS)).splitlines()]
    assert headings.count("machine") == headings.count("torch") == 1


def test_tsv_does_not_wrap_and_leaves_out_empty_advice() -> None:
    lines = findings_tsv(FINDINGS).splitlines()
    assert lines[0] == "ok\tmachine\tCPUs\t2"
    assert lines[1] == "warning\tmachine\tdisk\t1 GB free\tfree some space"
    assert len(lines) == 3


def test_problems_raise_with_their_names_and_warnings_do_not() -> None:
    raise_on_problem(FINDINGS[:2])
    with pytest.raises(StageFailed, match=r"^doctor: 1 problem: GPUs$"):
        raise_on_problem(FINDINGS)
    with pytest.raises(StageFailed, match=r"^doctor: 2 problems: GPUs, GPUs$"):
        raise_on_problem([*FINDINGS, FINDINGS[2]])


def test_advice_is_given_only_with_a_warning() -> None:
    assert warn_unless(True, "a", "b", "c", "do it") == Finding("a", "b", "c", OK, "")
    assert warn_unless(False, "a", "b", "c", "do it") == Finding("a", "b", "c", WARNING, "do it")

"""Findings of `firstlight doctor`, as a table for terminals and as tab-separated lines for pipes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from firstlight.pipeline.errors import StageFailed
from firstlight.pipeline.terminal import Column, build_table, format_tsv

OK, WARNING, PROBLEM = "ok", "warning", "problem"
VERDICT_STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
VERDICT_MARKS = {OK: "✓", WARNING: "!", PROBLEM: "✗"}
FINDING_COLUMNS = (Column("", fixed=True), Column("check", fixed=True), Column("result, and what to do"))


@dataclass(frozen=True)
class Finding:
    """The result of one check. `advice` says what to do about it, and may be empty."""

    area: str
    subject: str
    observation: str
    verdict: str = OK
    advice: str = ""


def warn_unless(fine: bool, area: str, subject: str, observation: str, advice: str) -> Finding:
    """Returns a finding without advice if `fine`, and a warning otherwise."""
    return Finding(area, subject, observation) if fine else Finding(area, subject, observation, WARNING, advice)


def raise_on_problem(findings: Sequence[Finding]) -> None:
    """Raises `StageFailed` if a finding is a problem; the message names all of them."""
    problems = [finding.subject for finding in findings if finding.verdict == PROBLEM]
    if problems:
        raise StageFailed(f"doctor: {len(problems)} problem{'s' if len(problems) > 1 else ''}: {', '.join(problems)}")


def findings_table(findings: Sequence[Finding]) -> Table:
    """Returns a table with a heading for each area, and with the advice below each result."""
    return build_table(FINDING_COLUMNS, _finding_rows(findings))


def _finding_rows(findings: Sequence[Finding]) -> Iterator[tuple[RenderableType, ...]]:
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            yield "", Text(area, style="bold"), ""
        style = VERDICT_STYLES[finding.verdict]
        result = Text(finding.observation)
        if finding.advice:
            result.append(f"\n{finding.advice}", style)
        yield Text(VERDICT_MARKS[finding.verdict], style), f"  {finding.subject}", result


def findings_tsv(findings: Sequence[Finding]) -> str:
    """Returns a line of tab-separated cells for each finding: verdict, area, subject, observation, any advice."""
    return format_tsv(
        (f.verdict, f.area, f.subject, f.observation, *([f.advice] if f.advice else [])) for f in findings
    )

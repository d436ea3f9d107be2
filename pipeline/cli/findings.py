"""The findings of `firstlight doctor` as a table, and as lines."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from firstlight.pipeline.cli.doctor import OK, PROBLEM, WARNING, Finding

STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
MARKS = {OK: "✓", WARNING: "!", PROBLEM: "✗"}


def table(found: Sequence[Finding]) -> Table:
    """What to do stands below what was found."""
    out = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "checked", "found, and what to do"):
        out.add_column(heading, overflow="fold", no_wrap=heading != "found, and what to do")
    area = ""
    for finding in found:
        if finding.area != area:
            area = finding.area
            out.add_row("", Text(area, style="bold"), "")
        cell = Text(finding.found)
        if finding.advice:
            cell.append(f"\n{finding.advice}", STYLES[finding.verdict])
        out.add_row(Text(MARKS[finding.verdict], STYLES[finding.verdict]), f"  {finding.what}", cell)
    return out


def plain(found: Sequence[Finding]) -> str:
    """A line of tab-separated cells for each: verdict, area, what, found, advice."""
    return "\n".join("\t".join((f.verdict, f.area, f.what, f.found, f.advice)).rstrip() for f in found)

"""The methods that Firstlight recommends, by what a user has, each with the measurement that speaks for it.

They stand in `conf/starter.yaml`; `firstlight recipes` and docs/guide.md show them.
"""

from dataclasses import dataclass

from rich.table import Table

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.conf_files import STARTER_FILE
from firstlight.pipeline.terminal import Column, build_table

ADVICE_COLUMNS = (Column("you have"), Column("take", fixed=True), Column("measured"))


@dataclass(frozen=True)
class MethodAdvice:
    """A recommendation: for whom, what to take, and what was measured."""

    case: str
    take: str
    because: str


def read_advice() -> list[MethodAdvice]:
    """Returns the recommendations in their order."""
    return [MethodAdvice(**entry) for entry in yaml_reader.read_yaml(STARTER_FILE)["advice"]]


def build_advice_table() -> Table:
    """Returns the recommendations as a table for the terminal."""
    rows = [[text.replace("`", "") for text in (one.case, one.take, one.because)] for one in read_advice()]
    title = "Which method to take; the numbers are those of docs/results.md"
    return build_table(ADVICE_COLUMNS, rows, title, grid=True)

"""The contract of a logger: one that is not MLflow, and gets what MLflow has got.

A logger is opened for one run of MLflow when the run has its first number or figure, and again by every command that
continues the run. It gets numbers by step, figures, and the state in which the run ended. Final scores are numbers of
step 0, as in MLflow. It never gets a number twice: it says what it holds when it is opened, and the group that it is in
leaves that out. It then gets the numbers and files of MLflow that it lacks after a kill or an outage.

To add one, write a subclass of `RunLogger`, and add it to `LOGGERS` (registry.py), or from a package of your own by
an entry point of the group `firstlight.loggers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple


class LoggedNumber(NamedTuple):
    """A number of a run, by its key in MLflow (docs/mlflow.md). `time` is in seconds since 1970."""

    key: str
    step: int
    value: float
    time: float


@dataclass(frozen=True)
class LoggedRun:
    """A run of MLflow that has started: a recipe, a search, a trial, or a stage and seed.

    `id` and `parent` are ids in MLflow. `params` and `tags` are those that the run started with, without MLflow's own
    tags. `storage` is the folder of a recipe's stores and results, in which a logger may keep a folder of its name.
    """

    id: str
    name: str
    recipe: str
    experiment: str
    storage: Path
    kind: str = "recipe"
    parent: str | None = None
    description: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class RunLogger(ABC):
    """Logs one run. Methods may raise anything: the logger is then left out with one note, and the work goes on.

    Calls come from one thread at a time. The values of a call should be on disk, or on their way there, when it
    returns.
    """

    # The package that the logger imports, and the extra of Firstlight that installs it
    package: ClassVar[str] = ""
    extra: ClassVar[str] = ""

    @classmethod
    def find_problem(cls) -> str:
        """Returns what keeps the logger from being used here, in a few words; "" if nothing does.

        It is asked before any work. The package is installed then. It must not import what takes seconds.
        """
        return ""

    @abstractmethod
    def __init__(self, run: LoggedRun) -> None:
        """Opens the log of a run, or continues it."""

    @abstractmethod
    def list_numbers(self) -> Iterable[tuple[str, int, float]]:
        """Returns key, step and value of all numbers that the log had when it was opened."""

    @abstractmethod
    def list_images(self) -> Iterable[tuple[str, str]]:
        """Returns name and sha256 of the PNG files that the log had when it was opened."""

    @abstractmethod
    def log_numbers(self, numbers: Sequence[LoggedNumber]) -> None:
        """Logs numbers that are not in the log. The steps of different keys come in any order."""

    @abstractmethod
    def log_image(self, name: str, file: Path, title: str) -> None:
        """Logs a PNG file."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """Closes the log. `status`: FINISHED, FAILED or KILLED. A later command may open it again."""

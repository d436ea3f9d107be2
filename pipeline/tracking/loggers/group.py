"""The loggers of the runs of a recipe, which follow MLflow.

They get everything that MLflow has accepted. When one is opened, it gets what MLflow has and it lacks: the numbers that
a killed process did not pass on, those of an outage, or all, of a run that began without it.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape

from firstlight.pipeline.terminal import SafeConsole, escape_line
from firstlight.pipeline.tracking.loggers.contract import LoggedNumber, LoggedRun, RunLogger
from firstlight.pipeline.tracking.loggers.registry import LOGGERS
from firstlight.pipeline.tracking.retry import describe_failure, short_timeouts

if TYPE_CHECKING:
    from mlflow import MlflowClient


class LoggerGroup:
    """Passes on to the loggers of `tracking.loggers` what MLflow has got. None of its methods raises."""

    def __init__(self, names: Sequence[str], client: "MlflowClient", console: Console | None = None) -> None:
        """Takes the loggers' names and `client`, which must be one that does not retry."""
        self.classes: dict[str, type[RunLogger]] = {name: LOGGERS[name] for name in names}
        self.client, self.console = client, console or SafeConsole(stderr=True)
        self._runs: dict[str, LoggedRun] = {}
        self._opened: dict[str, dict[str, _OpenedLogger]] = {}
        # A thread passes on the numbers of trainings.
        self._lock = threading.RLock()

    def start_run(self, run: LoggedRun) -> None:
        """Notes a run, whose logs are opened when there is something to log."""
        if self.classes:
            with self._lock:
                self._runs[run.id] = run

    def log_numbers(self, run_id: str, numbers: Sequence[LoggedNumber]) -> None:
        """Passes numbers on that MLflow has accepted."""
        with self._lock:
            for name, opened in self._open_run(run_id):
                with self._leave_out_on_failure(name):
                    opened.log_numbers(numbers)

    def log_image(self, run_id: str, name: str, file: Path, title: str) -> None:
        """Passes a PNG file on. One that the log has is not logged again."""
        with self._lock:
            for logger_name, opened in self._open_run(run_id):
                with self._leave_out_on_failure(logger_name):
                    opened.log_image(name, file, title)

    def finish_run(self, run_id: str, status: str) -> None:
        """Closes the logs of a run."""
        with self._lock:
            for name, opened in self._open_run(run_id):
                with self._leave_out_on_failure(name):
                    opened.logger.finish(status)
            self._runs.pop(run_id, None)
            self._opened.pop(run_id, None)

    def _open_run(self, run_id: str) -> list[tuple[str, "_OpenedLogger"]]:
        """Returns the opened loggers of a run by name; [] for a run that this process has not started."""
        if not self.classes or run_id not in self._runs:
            return []
        if run_id not in self._opened:
            try:
                history = self._read_history(run_id)
            except Exception as error:
                # MLflow is unreachable again. The next call tries it once more.
                self._print_note(f"the loggers of {self._runs[run_id].name} wait for MLflow: {describe_failure(error)}")
                return []
            self._opened[run_id] = {}
            for name in list(self.classes):
                with self._leave_out_on_failure(name):
                    opened = _OpenedLogger(self.classes[name](self._runs[run_id]))
                    opened.log_numbers(history)
                    self._opened[run_id][name] = opened
        return [(name, opened) for name, opened in self._opened[run_id].items() if name in self.classes]

    def _read_history(self, run_id: str) -> list[LoggedNumber]:
        """Returns the numbers that MLflow has of a run, in the order of their steps."""
        with short_timeouts():
            keys = self.client.get_run(run_id).data.metrics
            found = [metric for key in keys for metric in self.client.get_metric_history(run_id, key)]
        numbers = [LoggedNumber(m.key, int(m.step), float(m.value), m.timestamp / 1000) for m in found]
        return sorted(numbers, key=lambda number: number.step)

    @contextmanager
    def _leave_out_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        # The packages of loggers raise anything, and no training ends for it.
        except Exception as error:
            if self.classes.pop(name, None) is not None:
                text = f"{type(error).__name__}: {describe_failure(error)}"
                self._print_note(f"the logger {name} has failed ({text}): the work goes on without it, MLflow has all")

    def _print_note(self, text: str) -> None:
        self.console.print(f"[yellow]note[/] {escape(escape_line(text))}", highlight=False, soft_wrap=True)


class _OpenedLogger:
    """The logger of a run, and what its log has."""

    def __init__(self, logger: RunLogger) -> None:
        self.logger = logger
        self.held = {_identify_number(*number) for number in logger.list_numbers()}
        self.images = set(logger.list_images())

    def log_numbers(self, numbers: Sequence[LoggedNumber]) -> None:
        new = {_identify_number(*number[:3]): number for number in numbers}
        missing = {identity: number for identity, number in new.items() if identity not in self.held}
        if missing:
            self.logger.log_numbers(list(missing.values()))
            self.held |= missing.keys()

    def log_image(self, name: str, file: Path, title: str) -> None:
        image = (name, hashlib.sha256(file.read_bytes()).hexdigest())
        if image not in self.images:
            self.logger.log_image(name, file, title)
            self.images.add(image)


def _identify_number(key: str, step: int, value: float) -> tuple[str, int, str]:
    """Returns what is equal for two records of a number, of which one may be in single precision, as TensorBoard's."""
    with np.errstate(over="ignore"):
        return key, int(step), repr(float(np.float32(value)))

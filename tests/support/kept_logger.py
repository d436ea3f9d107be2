"""A logger that keeps what it gets in memory, and a client of MLflow that has the numbers that a test gives it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from firstlight.pipeline.tracking.loggers.contract import LoggedNumber, LoggedRun, RunLogger


class KeptLogger(RunLogger):
    """Keeps numbers and images by run, as a log on disk keeps them when it is opened again."""

    kept: ClassVar[dict[str, list[LoggedNumber]]] = {}
    images: ClassVar[dict[str, list[tuple[str, str]]]] = {}
    events: ClassVar[list[tuple[str, str]]] = []
    # The method that raises
    failing: ClassVar[str] = ""

    @classmethod
    def forget(cls) -> None:
        cls.kept, cls.images, cls.events, cls.failing = {}, {}, [], ""

    def __init__(self, run: LoggedRun) -> None:
        self.run = run
        self._tell("open")
        self.before = list(self.kept.setdefault(run.id, []))
        self.images.setdefault(run.id, [])

    def _tell(self, what: str) -> None:
        if self.failing == what:
            raise OSError(28, "No space left on device")
        self.events.append((self.run.name, what))

    def list_numbers(self) -> Iterable[tuple[str, int, float]]:
        return [number[:3] for number in self.before]

    def list_images(self) -> Iterable[tuple[str, str]]:
        return list(self.images[self.run.id])

    def log_numbers(self, numbers: Sequence[LoggedNumber]) -> None:
        self._tell("numbers")
        self.kept[self.run.id] += numbers

    def log_image(self, name: str, file: Path, title: str) -> None:
        self._tell(f"image {title}")
        self.images[self.run.id].append((name, hashlib.sha256(file.read_bytes()).hexdigest()))

    def finish(self, status: str) -> None:
        self._tell(f"finish {status}")


@dataclass
class NumbersClient:
    """A client that answers a `LoggerGroup`'s question for the numbers of a run. `error` is raised instead, if there is
    one.
    """

    numbers: list[LoggedNumber] = field(default_factory=list)
    error: Exception | None = None

    def get_run(self, run_id: str) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(data=SimpleNamespace(metrics={number.key: number.value for number in self.numbers}))

    def get_metric_history(self, run_id: str, key: str) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(key=key, step=n.step, value=n.value, timestamp=int(1000 * n.time))
            for n in self.numbers
            if n.key == key
        ]

"""MLflow that may be away: its client with patience, and what a recipe leaves there, kept until it is back."""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape

from firstlight.pipeline.errors import StageFailed

WAITS = (0.5, 2.0, 5.0)  # seconds between the attempts of a call; after them MLflow counts as away
END_S = 60.0  # how long a recipe waits for MLflow at its end
STILL_S = 3.0  # between its attempts there
START_TIMEOUT_S, START_RETRIES = (
    4,
    1,
)  # of the first request to a server: with what is waited between them within 15 seconds
AWAY = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
)  # what MLflow calls a server that is gone and a locked database


class Away(Exception):
    """MLflow did not take a call, also when it was repeated."""


class Unpublished(StageFailed):
    """Everything was done, and MLflow has not got all of it. `found`: the rows of the table."""

    found: tuple[Any, ...] = ()


def is_away(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: no connection, a locked database, a full disk."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in AWAY
    return isinstance(error, (OSError, sqlite3.OperationalError)) and not isinstance(error, FileNotFoundError)


class Patient:
    """A client whose calls are repeated while MLflow is away. Once it has been, a call is made once only and in haste, until one succeeds."""

    def __init__(self, client: Any) -> None:
        self._client, self._away = client, False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            waits = iter(() if self._away else WAITS)
            while True:
                try:
                    with hasty() if self._away else nullcontext():
                        answer = method(*arguments, **named)
                except Exception as error:
                    if not is_away(error):
                        raise
                    wait = (
                        None if reason(error) == SILENT else next(waits, None)
                    )  # a silent server has been waited for already
                    if wait is None:
                        self._away = True
                        raise Away(reason(error)) from error
                    time.sleep(wait)
                else:
                    self._away = False
                    return answer

        return call


SILENT = "read timed out"


def reason(error: BaseException) -> str:
    """One short line; of a request, what happened to the connection."""
    text = " ".join((str(error) or type(error).__name__).split())
    for told in (
        "Connection refused",
        "Name or service not known",
        SILENT,
        "No route to host",
        "Connection reset",
        "database is locked",
    ):
        if told.lower() in text.lower():
            return told.lower()
    return text[:160]


@contextmanager
def hasty() -> Iterator[None]:
    """A server that does not answer is found out within seconds; uploads, later, get MLflow's own time."""
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": START_TIMEOUT_S, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": START_RETRIES}
    before = {key: os.environ.get(key) for key in limits}
    os.environ.update({key: str(value) for key, value in limits.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


class Outbox:
    """What is to be published, in order. Work goes on while MLflow is away: what it does not take waits here, and its makings are on disk."""

    def __init__(self, uri: str, console: Console) -> None:
        self.uri, self.console = uri, console
        self.waiting: dict[str, Callable[[], None]] = {}
        self.problem = ""

    def put(self, label: str, publish: Callable[[], None]) -> None:
        """Publish it behind all that waits, or keep it. `publish` may be called again after it has failed half-way."""
        self.waiting[label] = publish
        self.again()

    def again(self) -> None:
        """Offer what waits, up to the first that is refused."""
        published = []
        for label, publish in list(self.waiting.items()):
            try:
                publish()
            except Away as error:
                self.tell(str(error))
                return
            del self.waiting[label]
            published.append(label)
        if self.problem and published:
            self._note(f"MLflow at {self.uri} is back, and has {', '.join(published)}")
            self.problem = ""

    def tell(self, problem: str) -> None:
        """Once an outage."""
        if not self.problem:
            self._note(
                f"MLflow at {self.uri} is away ({problem}): the work goes on, its results are kept on disk and published later"
            )
        self.problem = problem

    def settle(self) -> None:
        """Wait for MLflow, for a bounded time.

        Raises:
            Unpublished: it did not come back; names `tracking.uri` and what is not published.
        """
        end = time.monotonic() + END_S
        self.again()
        if self.waiting:
            self._note(f"waiting up to {END_S:.0f} s for MLflow, to publish {', '.join(self.waiting)}")
        while self.waiting and time.monotonic() < end:
            time.sleep(STILL_S)
            self.again()
        if self.waiting:
            what = f"{len(self.waiting)} of its results are on disk and not published ({', '.join(self.waiting)})"
            raise Unpublished(
                f"tracking.uri: {self.uri!r} is away ({self.problem}): {what}; run the same command again to publish them"
            )

    def _note(self, text: str) -> None:
        self.console.print(f"[yellow]note[/] {escape(text)}", highlight=False, soft_wrap=True)

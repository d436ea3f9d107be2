"""A retrying client of MLflow, for outages of its server or database."""

import os
import random
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from firstlight.pipeline.errors import one_line

# Pauses between the attempts of a call. After the last attempt, MLflow counts as unreachable.
RETRY_WAITS_S = (0.5, 2.0, 5.0)
# Pauses between the attempts of a call that met another writer. Each is varied by a factor of up to CONFLICT_SPREAD, so
# that the writers do not meet again.
CONFLICT_WAITS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
CONFLICT_SPREAD = 2.0
# The limits of the first request to a server, which fails within 15 seconds, MLflow's own pauses included.
SHORT_TIMEOUT_S, SHORT_TIMEOUT_RETRIES = 4, 1
# MLflow's codes for a server that is down and a locked database.
UNAVAILABLE_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
READ_TIMED_OUT = "read timed out"
CONNECTION_PROBLEMS = (
    *("Connection refused", "Name or service not known", READ_TIMED_OUT, "No route to host", "Connection reset"),
    *("database is locked", "unable to open database file", "file is not a database"),
    *("database disk image is malformed", "attempt to write a readonly database", "database or disk is full"),
)
# The messages of databases if two writers met: the same call succeeds as soon as the other one is done.
CONFLICT_PROBLEMS = (
    *("unique constraint failed", "duplicate key value", "duplicate entry", "unique index", "unique key constraint"),
    *("deadlock", "could not serialize access", "lock wait timeout", "lock timeout"),
    *("database schema is locked", "database table is locked", "database schema has changed"),
    *("rows matched", "were matched", "transaction has been rolled back"),
)
MAX_FAILURE_CHARACTERS = 160


class TrackingUnavailable(Exception):
    """MLflow is unreachable: a call failed, and so did its repetitions."""


def is_tracking_error(error: BaseException) -> bool:
    """Returns True for errors of MLflow, without an import of MLflow."""
    known = sys.modules.get("mlflow.exceptions")
    return isinstance(error, TrackingUnavailable) or (known is not None and isinstance(error, known.MlflowException))


def is_unavailable(error: BaseException) -> bool:
    """Returns True if the same call may succeed later: no connection, a locked database or a full disk."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in UNAVAILABLE_CODES
    return isinstance(error, (OSError, sqlite3.OperationalError)) and not isinstance(error, FileNotFoundError)


def is_conflict(error: BaseException) -> bool:
    """Returns True if a call failed only because another process wrote the same rows at the same time."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or error.error_code == "RESOURCE_ALREADY_EXISTS":
        return False
    text = str(error).lower()
    return any(problem in text for problem in CONFLICT_PROBLEMS)


class RetryingClient:
    """A client of MLflow that repeats the calls that fail because MLflow is unreachable, or because of another writer.

    After a failure to reach MLflow, each call is tried only once and with short timeouts, until one succeeds.

    Raises:
        TrackingUnavailable: a call and its repetitions failed.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._unreachable = client, False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            waits = iter(() if self._unreachable else RETRY_WAITS_S)
            conflict_waits = iter(CONFLICT_WAITS_S)
            while True:
                try:
                    with short_timeouts() if self._unreachable else nullcontext():
                        answer = method(*arguments, **named)
                except Exception as error:
                    if is_conflict(error) and (pause := next(conflict_waits, None)) is not None:
                        time.sleep(pause * random.uniform(1 / CONFLICT_SPREAD, CONFLICT_SPREAD))  # noqa: S311
                        continue
                    if not is_unavailable(error):
                        raise
                    # The timeout of a server that does not answer is a wait in itself.
                    wait = None if describe_failure(error) == READ_TIMED_OUT else next(waits, None)
                    if wait is None:
                        self._unreachable = True
                        raise TrackingUnavailable(describe_failure(error)) from error
                    time.sleep(wait)
                else:
                    self._unreachable = False
                    return answer

        return call


def describe_failure(error: BaseException) -> str:
    """Returns one short line about an error: for a request, what happened to the connection."""
    text = one_line(str(error) or type(error).__name__, 10_000)
    problem = next((problem for problem in CONNECTION_PROBLEMS if problem.lower() in text.lower()), None)
    return problem.lower() if problem else one_line(text, MAX_FAILURE_CHARACTERS)


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Shortens MLflow's timeouts in the block, so that a server that does not answer is detected within seconds."""
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": SHORT_TIMEOUT_S, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": SHORT_TIMEOUT_RETRIES}
    before = {key: os.environ.get(key) for key in limits}
    os.environ.update({key: str(value) for key, value in limits.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})

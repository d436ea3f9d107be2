"""Calls to MLflow are repeated while it is unreachable, and only then."""

import io

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    TEMPORARILY_UNAVAILABLE,
)
from rich.console import Console

from firstlight.pipeline.tracking import retry
from firstlight.pipeline.tracking.retry import RetryingClient, TrackingUnavailable, is_conflict, is_unavailable

pytestmark = pytest.mark.usefixtures("undrawn_figures")

QUIET = Console(quiet=True)


def told() -> Console:
    return Console(file=io.StringIO(), width=300)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_WAITS_S", (0.0, 0.0))


class RefusingClient:
    """Refuses the first `refuses` calls."""

    def __init__(self, refuses: int, error: Exception) -> None:
        self.refuses, self.error, self.calls = refuses, error, 0

    def set_tag(self, key: str, value: str) -> str:
        self.calls += 1
        if self.calls <= self.refuses:
            raise self.error
        return key + value


LOCKED = MlflowException("(sqlite3.OperationalError) database is locked", error_code=TEMPORARILY_UNAVAILABLE)


@pytest.mark.parametrize(
    ("error", "unavailable"),
    [
        (LOCKED, True),
        (MlflowException("API request to http://x failed", error_code=INTERNAL_ERROR), True),
        (MlflowException("bad key", error_code=INVALID_PARAMETER_VALUE), False),
        (ConnectionRefusedError(), True),
        (OSError(28, "No space left on device"), True),
        (FileNotFoundError(2, "encoder"), False),
        (KeyError("x"), False),
    ],
)
def test_unavailable_errors_are_recognised(error: Exception, unavailable: bool) -> None:
    assert is_unavailable(error) == unavailable


def test_call_is_repeated_and_after_an_outage_tried_once(no_waits: None) -> None:
    client = RefusingClient(2, LOCKED)
    assert RetryingClient(client).set_tag("a", value="b") == "ab"
    assert client.calls == 3
    client = RefusingClient(4, LOCKED)
    retrying = RetryingClient(client)
    with pytest.raises(TrackingUnavailable, match=r"^database is locked$"):
        retrying.set_tag("a", "b")
    assert client.calls == 3
    with pytest.raises(TrackingUnavailable):
        retrying.set_tag("a", "b")
    assert client.calls == 4, "no waiting after an outage"
    assert retrying.set_tag("a", "b") == "ab"
    client.calls = 2
    assert retrying.set_tag("a", "b") == "ab"
    assert client.calls == 5, "after a success calls are repeated again"


UNIQUE = MlflowException(
    "(sqlite3.IntegrityError) UNIQUE constraint failed: registered_model_aliases.name", error_code=BAD_REQUEST
)


@pytest.mark.parametrize(
    ("error", "conflict"),
    [
        (UNIQUE, True),
        (
            MlflowException(
                '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "x"',
                error_code=BAD_REQUEST,
            ),
            True,
        ),
        (
            MlflowException(
                "(pymysql.err.IntegrityError) (1062, Duplicate entry 'a' for key 'PRIMARY')", error_code=BAD_REQUEST
            ),
            True,
        ),
        (
            MlflowException(
                "(1213, 'Deadlock found when trying to get lock; try restarting transaction')", error_code=BAD_REQUEST
            ),
            True,
        ),
        (MlflowException("could not serialize access due to concurrent update", error_code=BAD_REQUEST), True),
        (
            MlflowException(
                "UPDATE statement on table 'tags' expected to update 1 row(s); 0 were matched.", error_code=BAD_REQUEST
            ),
            True,
        ),
        (MlflowException("x already exists. UNIQUE constraint failed", error_code=RESOURCE_ALREADY_EXISTS), False),
        (MlflowException("bad key", error_code=INVALID_PARAMETER_VALUE), False),
        (KeyError("UNIQUE constraint failed"), False),
    ],
)
def test_conflicts_of_writers_are_recognised(error: Exception, conflict: bool) -> None:
    assert is_conflict(error) == conflict


def test_call_that_met_another_writer_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "CONFLICT_WAITS_S", (0.0, 0.0, 0.0))
    client = RefusingClient(3, UNIQUE)
    assert RetryingClient(client).set_tag("a", "b") == "ab"
    assert client.calls == 4
    client = RefusingClient(9, UNIQUE)
    with pytest.raises(MlflowException, match="UNIQUE constraint failed"):
        RetryingClient(client).set_tag("a", "b")
    assert client.calls == 4, "a constraint that always fails is no conflict"


def test_call_to_a_silent_server_is_not_repeated(no_waits: None) -> None:
    client = RefusingClient(
        9, MlflowException("HTTPConnectionPool: Read timed out. (read timeout=60)", error_code=INTERNAL_ERROR)
    )
    with pytest.raises(TrackingUnavailable, match=r"^read timed out$"):
        RetryingClient(client).set_tag("a", "b")
    assert client.calls == 1


def test_refused_call_is_not_repeated(no_waits: None) -> None:
    client = RefusingClient(1, MlflowException("bad key", error_code=INVALID_PARAMETER_VALUE))
    with pytest.raises(MlflowException, match="bad key"):
        RetryingClient(client).set_tag("a", "b")
    assert client.calls == 1

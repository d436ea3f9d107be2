"""MLflow that goes away: what is repeated, what waits, and a whole recipe whose server is killed."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from rich.console import Console

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages import evaluate, pretrain
from firstlight.pipeline.tracking import retry
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.outbox import Outbox, Unpublished
from firstlight.pipeline.tracking.retry import RetryingClient, TrackingUnavailable, is_unavailable
from tests.support import recipes

pytestmark = pytest.mark.usefixtures("blank_figures")

QUIET = Console(quiet=True)


def told() -> Console:
    return Console(file=io.StringIO(), width=300)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(retry, "FLUSH_TIMEOUT_S", 0.3)
    monkeypatch.setattr(retry, "FLUSH_POLL_S", 0.05)


class Client:
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
    ("error", "away"),
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
def test_what_counts_as_away(error: Exception, away: bool) -> None:
    assert is_unavailable(error) == away


def test_a_call_is_repeated_and_then_given_up_and_made_once_until_one_succeeds(no_waits: None) -> None:
    client = Client(2, LOCKED)
    assert RetryingClient(client).set_tag("a", value="b") == "ab"
    assert client.calls == 3
    client = Client(4, LOCKED)
    patient = RetryingClient(client)
    with pytest.raises(TrackingUnavailable, match=r"^database is locked$"):
        patient.set_tag("a", "b")
    assert client.calls == 3
    with pytest.raises(TrackingUnavailable):
        patient.set_tag("a", "b")
    assert client.calls == 4, "no waiting for a server that was found to be away"
    assert patient.set_tag("a", "b") == "ab"
    client.calls = 2
    assert patient.set_tag("a", "b") == "ab"
    assert client.calls == 5, "after a success it is patient again"


def test_a_silent_server_is_not_waited_for_again(no_waits: None) -> None:
    client = Client(
        9, MlflowException("HTTPConnectionPool: Read timed out. (read timeout=60)", error_code=INTERNAL_ERROR)
    )
    with pytest.raises(TrackingUnavailable, match=r"^read timed out$"):
        RetryingClient(client).set_tag("a", "b")
    assert client.calls == 1


def test_a_mistake_is_not_repeated(no_waits: None) -> None:
    client = Client(1, MlflowException("bad key", error_code=INVALID_PARAMETER_VALUE))
    with pytest.raises(MlflowException, match="bad key"):
        RetryingClient(client).set_tag("a", "b")
    assert client.calls == 1


def test_the_outbox_keeps_the_order_and_tells_once(no_waits: None) -> None:
    away, got, console = True, [], told()

    def publish(name: str) -> Callable[[], None]:
        def call() -> None:
            if away:
                raise TrackingUnavailable("connection refused")
            got.append(name)

        return call

    outbox = Outbox("http://host:5000", console)
    for name in ("a", "b"):
        outbox.put(name, publish(name))
    away = False
    outbox.put("c", publish("c"))
    assert got == ["a", "b", "c"]
    assert lines(console) == [
        "note MLflow at http://host:5000 is away (connection refused): the work goes on, its results are kept on disk and published later",
        "note MLflow at http://host:5000 is back, and has a, b, c",
    ]
    away = True
    outbox.put("d", publish("d"))
    with pytest.raises(Unpublished) as caught:
        outbox.flush()
    assert str(caught.value) == (
        "tracking.uri: 'http://host:5000' is away (connection refused): 1 of its results are on disk and not published (d); "
        "run the same command again to publish them"
    )
    outbox.put("e", lambda: None)
    assert list(outbox.waiting) == ["d", "e"], "what is behind waits too"
    away = False
    outbox.flush()
    assert got == ["a", "b", "c", "d"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`mlflow server` on 127.0.0.1, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet: dict[str, Any] = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "start_new_session": True,
            "env": environment,
        }
        self.process = subprocess.Popen(command, **quiet)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.3)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def losses(uri: str) -> dict[str, list[tuple[int, float]]]:
    """Step and loss by the name of a stage's run and the name of the number."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("firstlight")
    assert experiment is not None
    out = {}
    for found in client.search_runs([experiment.experiment_id]):
        for key in found.data.metrics:
            if key.endswith("loss"):
                history = client.get_metric_history(found.info.run_id, key)
                out[f"{found.info.run_name} {key}"] = sorted((m.step, m.value) for m in history)
    return out


@pytest.mark.fault(41, "the MLflow server is killed twice in the middle")
@pytest.mark.timeout(600)
def test_a_server_that_is_killed_in_the_middle_loses_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the pretraining works, started again while the fine-tuning is due; killed again for the rest; then back for the next run."""
    monkeypatch.setattr(retry, "RETRY_WAITS_S", (0.1,))
    monkeypatch.setattr(retry, "FLUSH_TIMEOUT_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    undisturbed = recipes.recipe(tmp_path / "undisturbed")
    rows = run_recipe(undisturbed, QUIET)
    recipe, console = recipes.recipe(tmp_path / "st", tracking__uri=server.uri), told()
    fit, look = pretrain.fit, evaluate.EvaluateStage.run

    def fit_then_kill(*arguments: Any) -> None:
        fit(*arguments)
        server.kill()

    def kill_then_fit(*arguments: Any) -> None:
        server.kill()
        fit(*arguments)

    def start_then_look(*arguments: Any) -> None:
        server.start()
        look(*arguments)

    monkeypatch.setattr(pretrain, "fit", fit_then_kill)
    monkeypatch.setattr(evaluate.EvaluateStage, "run", start_then_look)
    assert run_recipe(recipe, console) == rows
    assert losses(server.uri) == losses(TrackingClient(undisturbed).uri)
    assert statuses(server.uri) == {"FINISHED"}
    shown = [line for line in lines(console) if "note MLflow" in line]
    assert [line.split(" (")[0].removeprefix("note ") for line in shown] == [
        f"MLflow at {server.uri} is away",
        f"MLflow at {server.uri} is back, and has pretrain seed 0, evaluate seed 0",
    ]

    monkeypatch.setattr(evaluate, "work", look)
    monkeypatch.setattr(pretrain, "fit", kill_then_fit)
    gone = recipes.recipe(tmp_path / "gone", tracking__uri=server.uri, tracking__experiment="gone")
    with pytest.raises(Unpublished) as caught:
        run_recipe(gone, console)
    assert list(caught.value.rows) == rows, "the table is there"
    waiting = "pretrain seed 0, evaluate seed 0, finetune seed 0, the summary, the report"
    assert f"5 of its results are on disk and not published ({waiting})" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    started = time.monotonic()
    with pytest.raises(UserError, match=r"tracking.uri: 'http://127.0.0.1:\d+' cannot be used: connection refused"):
        run_recipe(gone, QUIET)
    assert time.monotonic() - started < 15
    server.start()
    console = told()
    assert run_recipe(gone, console) == rows
    assert not [line for line in lines(console) if "started" in line], "nothing is trained again"
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("gone")
    assert experiment is not None
    found = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    assert set(found) == {"small", "prepare", "pretrain seed 0", "evaluate seed 0", "finetune seed 0"}
    history = client.get_metric_history(found["pretrain seed 0"].info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == losses(server.uri)["pretrain seed 0 loss"]
    assert "table.json" in {a.path for a in client.list_artifacts(found["small"].info.run_id)}


def statuses(uri: str) -> set[str]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("firstlight")
    assert experiment is not None
    return {r.info.status for r in client.search_runs([experiment.experiment_id])}


@pytest.mark.fault(41, "an MLflow server that never answers")
def test_a_server_that_accepts_and_never_answers_is_found_out_in_time(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri, started = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(UserError, match=f"^tracking.uri: '{uri}' cannot be used: read timed out$"):
            TrackingClient(recipes.recipe(tmp_path, tracking__uri=uri))
        assert time.monotonic() - started < 15
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60", "only the first request is in a hurry"

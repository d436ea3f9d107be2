"""Uploads wait while MLflow is unreachable: their order, and a recipe whose server is killed."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages import evaluate, pretrain
from firstlight.pipeline.tracking import outbox as outbox_module
from firstlight.pipeline.tracking import retry
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.outbox import Outbox, Unpublished
from firstlight.pipeline.tracking.retry import TrackingUnavailable
from tests.support import recipes
from tests.support.mlflow_server import KillableServer

pytestmark = pytest.mark.usefixtures("undrawn_figures")

QUIET = Console(quiet=True)


def make_console() -> Console:
    return Console(file=io.StringIO(), width=300)


def read_lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_outbox_keeps_the_order_and_notes_an_outage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "FLUSH_TIMEOUT_S", 0.3)
    monkeypatch.setattr(outbox_module, "FLUSH_POLL_S", 0.05)
    unreachable, got, console = True, [], make_console()

    def publish(name: str) -> Callable[[], None]:
        def call() -> None:
            if unreachable:
                raise TrackingUnavailable("connection refused")
            got.append(name)

        return call

    outbox = Outbox("http://host:5000", console)
    for name in ("a", "b"):
        outbox.put(name, publish(name))
    unreachable = False
    outbox.put("c", publish("c"))
    assert got == ["a", "b", "c"]
    assert read_lines(console) == [
        "note MLflow at http://host:5000 is unreachable (connection refused): the work goes on, "
        "its results are kept on disk and published later",
        "note MLflow at http://host:5000 is reachable again, and has a, b, c",
    ]
    unreachable = True
    outbox.put("d", publish("d"))
    with pytest.raises(Unpublished) as caught:
        outbox.flush()
    assert str(caught.value) == (
        "tracking.uri: 'http://host:5000' is unreachable (connection refused): 1 of its results are on disk and not "
        "published (d); run the same command again to publish them"
    )
    outbox.put("e", lambda: None)
    assert list(outbox.waiting) == ["d", "e"], "later uploads wait too"
    unreachable = False
    outbox.flush()
    assert got == ["a", "b", "c", "d"]


def read_losses(uri: str) -> dict[str, list[tuple[int, float]]]:
    """Returns steps and losses by the name of a stage's run and the key of the metric."""
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[KillableServer]:
    server = KillableServer(tmp_path)
    server.start()
    yield server
    server.close()


@pytest.mark.fault(41, "the MLflow server is killed twice in the middle")
@pytest.mark.timeout(600)
def test_recipe_whose_server_is_killed_loses_nothing(
    tmp_path: Path, server: KillableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed during a pretraining until the evaluation, and then in a second run until a third."""
    monkeypatch.setattr(retry, "RETRY_WAITS_S", (0.1,))
    monkeypatch.setattr(retry, "SHORT_TIMEOUT_RETRIES", 0)
    monkeypatch.setattr(outbox_module, "FLUSH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(outbox_module, "FLUSH_POLL_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    undisturbed = recipes.recipe(tmp_path / "undisturbed")
    rows = run_recipe(undisturbed, QUIET).rows
    recipe, console = recipes.recipe(tmp_path / "st", tracking__uri=server.uri), make_console()
    fit, run_evaluation = pretrain.fit, evaluate.EvaluateStage.run

    def fit_then_kill(*arguments: Any) -> None:
        fit(*arguments)
        server.kill()

    def kill_then_fit(*arguments: Any) -> None:
        server.kill()
        fit(*arguments)

    def start_then_evaluate(*arguments: Any) -> None:
        server.start()
        run_evaluation(*arguments)

    monkeypatch.setattr(pretrain, "fit", fit_then_kill)
    monkeypatch.setattr(evaluate.EvaluateStage, "run", start_then_evaluate)
    assert run_recipe(recipe, console).rows == rows
    assert read_losses(server.uri) == read_losses(TrackingClient(undisturbed).uri)
    assert read_statuses(server.uri) == {"FINISHED"}
    notes = [line for line in read_lines(console) if "note MLflow" in line]
    assert [line.split(" (")[0].removeprefix("note ") for line in notes] == [
        f"MLflow at {server.uri} is unreachable",
        f"MLflow at {server.uri} is reachable again, and has pretrain seed 0, evaluate seed 0",
    ]

    monkeypatch.setattr(evaluate.EvaluateStage, "run", run_evaluation)
    monkeypatch.setattr(pretrain, "fit", kill_then_fit)
    gone = recipes.recipe(tmp_path / "gone", tracking__uri=server.uri, tracking__experiment="gone")
    with pytest.raises(Unpublished) as caught:
        run_recipe(gone, console)
    assert list(caught.value.rows) == rows, "the error carries the table"
    waiting = "pretrain seed 0, evaluate seed 0, finetune seed 0, the model cards, the summary, the report"
    assert f"6 of its results are on disk and not published ({waiting})" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setattr(retry, "SHORT_TIMEOUT_RETRIES", 1)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"tracking.uri: 'http://127.0.0.1:\d+' cannot be used: connection refused"):
        run_recipe(gone, QUIET)
    assert time.monotonic() - started < 15
    server.start()
    console = make_console()
    assert run_recipe(gone, console).rows == rows
    assert not [line for line in read_lines(console) if "started" in line], "nothing is trained again"
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("gone")
    assert experiment is not None
    found = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    assert set(found) == {"small", "prepare", "pretrain seed 0", "evaluate seed 0", "finetune seed 0"}
    history = client.get_metric_history(found["pretrain seed 0"].info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == read_losses(server.uri)["pretrain seed 0 loss"]
    assert "table.json" in {a.path for a in client.list_artifacts(found["small"].info.run_id)}


def read_statuses(uri: str) -> set[str]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("firstlight")
    assert experiment is not None
    return {r.info.status for r in client.search_runs([experiment.experiment_id])}

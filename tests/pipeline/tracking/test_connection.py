"""First connections to MLflow: many processes at once, killed processes, and servers that do not answer."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking import retry
from firstlight.pipeline.tracking.client import TrackingClient
from tests.support import recipes

# Written by every writer: steps, steps in one request, and encoders.
WRITERS, STEPS, BATCH, ENCODERS = 8, 300, 10, 2


def write_as_trial(storage: Path, k: int) -> None:
    """Does what a trial does, on a database that does not exist yet."""
    folder = storage / f"writer{k}"
    tracking = TrackingClient(recipes.recipe(storage, name=f"writer{k}"))
    run_id = tracking.start_run(f"writer {k}", folder / "mlflow.json", {"k": k}, {"firstlight.recipe": f"writer{k}"})
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    (encoder / "encoder.safetensors").write_bytes(bytes(k))
    for first in range(1, STEPS + 1, BATCH):
        tracking.log_metrics(
            run_id,
            [{"step": s, "time": 1000.0 + s, "loss": s / 7, "accuracy": k / 8} for s in range(first, first + BATCH)],
        )
        tracking.client.set_tag(run_id, f"tag{first}", str(k))
        if first % 50 == 1:
            tracking.client.log_text(run_id, str(first), f"texts/{first}.txt")
    for n in range(ENCODERS):
        own = tracking.start_run(
            f"encoder {n} of {k}", folder / f"{n}" / "mlflow.json", {}, {"mlflow.parentRunId": run_id}
        )
        tracking.log_encoder(own, encoder, StageInstance("pretrain", n, f"{k}-{n}", encoder), "shared")
        tracking.finish_run(own)
    tracking.finish_run(run_id)


@pytest.mark.fault(42, "eight writers on a fresh SQLite file")
@pytest.mark.timeout(600)
def test_eight_processes_on_a_fresh_database_lose_no_write(tmp_path: Path) -> None:
    started = [
        multiprocessing.get_context("fork").Process(target=write_as_trial, args=(tmp_path, k)) for k in range(WRITERS)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=580)
    assert [process.exitcode for process in started] == [0] * WRITERS
    tracking = TrackingClient(recipes.recipe(tmp_path))
    client = tracking.client
    assert len(client.search_experiments(filter_string="name = 'firstlight'")) == 1
    found = {run.info.run_name: run for run in client.search_runs([tracking.experiment_id])}
    assert len(found) == WRITERS * (1 + ENCODERS)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    for k in range(WRITERS):
        run = found[f"writer {k}"]
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((m.step, m.value) for m in history) == [(step, step / 7) for step in range(1, STEPS + 1)]
        assert {key: run.data.tags[key] for key in run.data.tags if key.startswith("tag")} == {
            f"tag{s}": str(k) for s in range(1, STEPS, BATCH)
        }
        assert len(client.list_artifacts(run.info.run_id, "texts")) == len(range(1, STEPS, 50))
    versions = client.search_model_versions("name='shared'")
    assert sorted(int(v.version) for v in versions) == list(range(1, WRITERS * ENCODERS + 1))
    assert len({v.run_id for v in versions}) == WRITERS * ENCODERS
    assert client.get_model_version_by_alias("shared", "current").run_id in {v.run_id for v in versions}


def test_two_storages_with_one_database_share_its_lock(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/shared.db"
    started = time.monotonic()
    first = TrackingClient(recipes.recipe(tmp_path / "a", tracking__uri=uri))
    second = TrackingClient(recipes.recipe(tmp_path / "b", tracking__uri=uri))
    assert first.experiment_id == second.experiment_id
    assert (tmp_path / ".mlflow.lock").exists()
    assert time.monotonic() - started < 120


@pytest.mark.fault(42, "killed while it made the tables")
def test_process_killed_while_creating_tables_leaves_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.recipe(tmp_path)

    def killed(temporary: Path, file: Path) -> None:
        temporary.write_bytes(temporary.read_bytes()[:4096])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("firstlight.pipeline.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            TrackingClient(recipe)
    assert not (tmp_path / "mlflow.db").exists()
    assert TrackingClient(recipe).client.get_experiment_by_name("firstlight") is not None


@pytest.mark.fault(41, "an MLflow server that never answers")
def test_server_that_never_answers_raises_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = retry.SHORT_TIMEOUT_S * (1 + retry.SHORT_TIMEOUT_RETRIES)
    assert longest < 15
    monkeypatch.setattr(retry, "SHORT_TIMEOUT_S", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri, started = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(UserError, match=f"^tracking.uri: '{uri}' cannot be used: read timed out$"):
            TrackingClient(recipes.recipe(tmp_path, tracking__uri=uri))
        assert time.monotonic() - started < 15 - longest
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60", "only the first request has a short timeout"

"""MLflow as many processes use it at once, and what a run remembers of what it took."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking import client as module
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.references import find_source_run, pin_reference
from tests.support import recipes

WRITERS, ROWS, EACH, ENCODERS = 8, 300, 10, 2


def write(storage: Path, k: int) -> None:
    """What a trial does: everything at once, on a database that is not there yet."""
    folder = storage / f"writer{k}"
    tracking = TrackingClient(recipes.recipe(storage, name=f"writer{k}"))
    run_id = tracking.start_run(f"writer {k}", folder / "mlflow.json", {"k": k}, {"firstlight.recipe": f"writer{k}"})
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    (encoder / "encoder.safetensors").write_bytes(bytes(k))
    for first in range(1, ROWS + 1, EACH):
        tracking.log_metrics(
            run_id,
            [{"step": s, "time": 1000.0 + s, "loss": s / 7, "accuracy": k / 8} for s in range(first, first + EACH)],
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
    started = [multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, k)) for k in range(WRITERS)]
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
        assert sorted((m.step, m.value) for m in history) == [(step, step / 7) for step in range(1, ROWS + 1)]
        assert {key: run.data.tags[key] for key in run.data.tags if key.startswith("tag")} == {
            f"tag{s}": str(k) for s in range(1, ROWS, EACH)
        }
        assert len(client.list_artifacts(run.info.run_id, "texts")) == 6
    versions = client.search_model_versions("name='shared'")
    assert sorted(int(v.version) for v in versions) == list(range(1, WRITERS * ENCODERS + 1))
    assert len({v.run_id for v in versions}) == WRITERS * ENCODERS
    assert client.get_model_version_by_alias("shared", "current").run_id in {v.run_id for v in versions}


@pytest.fixture
def tracking(tmp_path: Path) -> TrackingClient:
    return TrackingClient(recipes.recipe(tmp_path))


def encoder(tracking: TrackingClient, folder: Path, register_as: str | None) -> tuple[str, str]:
    """The run of an encoder, and its reference."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text("{}")
    run_id = tracking.start_run("pretrain seed 0", folder / "mlflow.json", {}, {})
    return run_id, tracking.log_encoder(run_id, folder, StageInstance("pretrain", 0, "f", folder), register_as)


def test_an_encoder_that_is_published_again_is_one_model_and_one_version(
    tracking: TrackingClient, tmp_path: Path
) -> None:
    run_id, reference = encoder(tracking, tmp_path / "a", "digits")
    assert encoder(tracking, tmp_path / "a", "digits") == (run_id, reference)
    assert [v.version for v in tracking.client.search_model_versions("name='digits'")] == [1]
    assert len(tracking.client.search_logged_models([tracking.experiment_id])) == 1


def test_what_a_run_consumed_stands_in_it(tracking: TrackingClient, tmp_path: Path) -> None:
    made_by, reference = encoder(tracking, tmp_path / "a", "digits")
    run_id = tracking.start_run("finetune seed 0", tmp_path / "b" / "mlflow.json", {}, {})
    pinned = pin_reference(tracking, "models:/digits@current", "stages.finetune.encoder")
    assert pinned == "models:/digits/1", "an alias moves, a version does not"
    tracking.log_encoder_source(run_id, pinned, find_source_run(tracking, pinned))
    found = tracking.client.get_run(run_id)
    assert found.data.tags["firstlight.encoder"] == "models:/digits/1"
    assert found.data.tags["firstlight.encoder_run"] == made_by
    assert [f"models:/{model.model_id}" for model in found.inputs.model_inputs] == [reference]


def test_a_run_can_be_named_by_the_beginning_of_its_id(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id, _ = encoder(tracking, tmp_path / "a", None)
    assert pin_reference(tracking, f"runs:/{run_id[:8]}/encoder", "x") == f"runs:/{run_id}/encoder"
    assert pin_reference(tracking, f"runs:/{run_id}/encoder", "x") == f"runs:/{run_id}/encoder"
    with pytest.raises(UserError, match=r"^stages.x.encoder: 'runs:/zz/encoder': no run begins with 'zz' in sqlite:"):
        pin_reference(tracking, "runs:/zz/encoder", "stages.x.encoder")


def test_rows_that_are_logged_twice_stay_one(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id = tracking.start_run("a", tmp_path / "a" / "mlflow.json", {}, {})
    rows: list[dict[str, Any]] = [{"step": k, "time": 1000.0 + k, "loss": 1 / k} for k in (1, 2, 3)]
    tracking.log_metrics_once(run_id, rows[:2])
    tracking.log_metrics(run_id, rows)
    assert [m.step for m in tracking.client.get_metric_history(run_id, "loss")] == [1, 2, 3]
    assert tracking.find_last_step(run_id, "loss") == 3


def test_a_run_that_cannot_be_asked_for_is_not_made_anew(
    tracking: TrackingClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A locked database must not lead to a second run of the same stage."""
    file = tmp_path / "a" / "mlflow.json"
    run_id = tracking.start_run("a", file, {}, {})
    monkeypatch.setattr("firstlight.pipeline.tracking.retry.RETRY_WAITS_S", ())

    def locked(*arguments: Any, **named: Any) -> None:
        raise mlflow.MlflowException("database is locked", error_code=module_code())

    monkeypatch.setattr(tracking.direct_client, "update_run", locked)
    with pytest.raises(module.TrackingUnavailable, match="database is locked"):
        tracking.start_run("a", file, {}, {})
    monkeypatch.undo()
    assert tracking.start_run("a", file, {}, {}) == run_id
    assert json.loads(file.read_text())["run_id"] == run_id


@pytest.mark.fault(55, "a run whose note was lost, with another setting")
def test_params_of_a_run_whose_process_was_killed_stay_what_they_were(tracking: TrackingClient, tmp_path: Path) -> None:
    """It had made the run and logged a part of it, and had not noted its id; the next command has another setting."""
    file = tmp_path / "a" / "mlflow.json"
    run_id = tracking.start_run("a", file, {"log_every": 1}, {})
    file.write_text(json.dumps({"key": json.loads(file.read_text())["key"]}))
    assert tracking.start_run("a", file, {"log_every": 2, "seed": 3}, {}) == run_id
    assert tracking.client.get_run(run_id).data.params == {"log_every": "1", "seed": "3"}


def module_code() -> int:
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    return int(TEMPORARILY_UNAVAILABLE)


def test_one_database_of_two_storages_has_one_lock(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/shared.db"
    started = time.monotonic()
    first = TrackingClient(recipes.recipe(tmp_path / "a", tracking__uri=uri))
    second = TrackingClient(recipes.recipe(tmp_path / "b", tracking__uri=uri))
    assert first.experiment_id == second.experiment_id
    assert (tmp_path / ".mlflow.lock").exists()
    assert time.monotonic() - started < 120


@pytest.mark.fault(42, "killed while it made the tables")
def test_a_process_that_was_killed_while_it_made_the_tables_leaves_nothing_in_the_way(
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

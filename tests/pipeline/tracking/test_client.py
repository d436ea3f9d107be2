"""Runs in MLflow: started once, reopened later, with metrics and parameters that are logged once."""

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking import retry
from firstlight.pipeline.tracking.client import TrackingClient, read_run_file, read_run_id


def test_rows_logged_twice_stay_one(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id = tracking.start_run("a", tmp_path / "a" / "mlflow.json", {}, {})
    rows: list[dict[str, Any]] = [{"step": k, "time": 1000.0 + k, "loss": 1 / k} for k in (1, 2, 3)]
    tracking.log_metrics_once(run_id, rows[:2])
    tracking.log_metrics(run_id, rows)
    assert [m.step for m in tracking.client.get_metric_history(run_id, "loss")] == [1, 2, 3]
    assert tracking.find_last_step(run_id, "loss") == 3


@pytest.mark.fault(8, "results published again")
@pytest.mark.parametrize("value", [0.5, 0.1 + 0.2, 0.0, -3, math.inf, -math.inf, math.nan])
def test_result_that_is_logged_again_stands_once(tracking: TrackingClient, tmp_path: Path, value: float) -> None:
    run_id = tracking.start_run("a", tmp_path / "a" / "mlflow.json", {}, {})
    for _ in range(3):
        tracking.log_results(run_id, {"score": value, "other": 1.0}, "knn/")
    assert len(tracking.client.get_metric_history(run_id, "knn/score")) == 1
    tracking.log_results(run_id, {"score": 0.25}, "knn/")
    assert tracking.client.get_run(run_id).data.metrics["knn/score"] == 0.25, "a changed result replaces the first"
    tracking.log_results(run_id, {"score": 0.125}, "knn/")
    assert tracking.client.get_run(run_id).data.metrics == {"knn/score": 0.125, "knn/other": 1.0}


@pytest.mark.fault(8, "a step repeated after a resume, published again")
def test_step_that_a_resumed_training_repeated_stands_once(tracking: TrackingClient, tmp_path: Path) -> None:
    """MLflow has steps 1 and 2, of step 2 only some keys; the training has repeated step 2 at another time."""
    run_id = tracking.start_run("a", tmp_path / "a" / "mlflow.json", {}, {})
    first: list[dict[str, Any]] = [{"step": k, "of": 3, "time": 1000.0 + k, "loss": 1 / k} for k in (1, 2)]
    tracking.log_metrics(run_id, first, "lr/")
    rows = [{"step": k, "of": 3, "time": 2000.0 + k, "loss": 1 / k, "lr": 0.1} for k in (1, 2, 3)]
    for _ in range(2):
        tracking.log_missing_metrics(run_id, rows, "lr/")
        steps = {
            key: [m.step for m in tracking.client.get_metric_history(run_id, f"lr/{key}")] for key in ("loss", "lr")
        }
        assert steps == {"loss": [1, 2, 3], "lr": [2, 3]}


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"run_id": 3}', '{"key": "x\'"}', '{"run_id": "a/b"}', '{"closed": 1}']
)
def test_note_of_a_run_that_is_damaged_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "mlflow.json").write_text(text)
    for read in (read_run_id, lambda folder: read_run_file(folder / "mlflow.json")):
        with pytest.raises(
            UserError, match=rf"^{tmp_path}/mlflow\.json: is damaged: .*; delete this file and run again"
        ):
            read(tmp_path)


@pytest.mark.fault(18, "a bit of the id of a run")
def test_changed_id_of_a_run_is_detected(tracking: TrackingClient, tmp_path: Path) -> None:
    file = tmp_path / "a" / "mlflow.json"
    run_id = tracking.start_run("a", file, {}, {})
    file.write_text(file.read_text().replace(run_id, ("0" if run_id[0] != "0" else "1") + run_id[1:]))
    with pytest.raises(UserError, match=r"mlflow\.json: is damaged: its content differs from its sum"):
        tracking.start_run("a", file, {}, {})


def test_run_is_not_created_again_while_the_database_is_locked(
    tracking: TrackingClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A locked database must not lead to a second run of the same stage."""
    file = tmp_path / "a" / "mlflow.json"
    run_id = tracking.start_run("a", file, {}, {})
    monkeypatch.setattr(retry, "RETRY_WAITS_S", ())

    def locked(*arguments: Any, **named: Any) -> None:
        raise mlflow.MlflowException("database is locked", error_code=unavailable_code())

    monkeypatch.setattr(tracking.direct_client, "update_run", locked)
    with pytest.raises(retry.TrackingUnavailable, match="database is locked"):
        tracking.start_run("a", file, {}, {})
    monkeypatch.undo()
    assert tracking.start_run("a", file, {}, {}) == run_id
    assert json.loads(file.read_text())["run_id"] == run_id


@pytest.mark.fault(55, "a run whose note was lost, with another setting")
def test_logged_params_of_a_killed_process_are_kept(tracking: TrackingClient, tmp_path: Path) -> None:
    """The process created the run and logged a part of it, but did not note its id. The next has another setting."""
    file = tmp_path / "a" / "mlflow.json"
    run_id = tracking.start_run("a", file, {"log_every": 1}, {})
    file.write_text(json.dumps({"key": json.loads(file.read_text())["key"]}))
    assert tracking.start_run("a", file, {"log_every": 2, "seed": 3}, {}) == run_id
    assert tracking.client.get_run(run_id).data.params == {"log_every": "1", "seed": "3"}


def unavailable_code() -> int:
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    return int(TEMPORARILY_UNAVAILABLE)

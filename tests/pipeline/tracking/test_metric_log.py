"""Numbers that are logged again stand once in MLflow."""

import math
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.tracking.client import TrackingClient


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

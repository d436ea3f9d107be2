"""Runs in MLflow: started once, reopened later, with parameters that are logged once, and a card."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest

from firstlight.pipeline.tracking import retry
from firstlight.pipeline.tracking.client import TrackingClient


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


def test_a_card_that_is_too_long_for_a_tag_ends_with_a_whole_section(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id = tracking.start_run("r", tmp_path / "run.json", {}, {})
    (tmp_path / "card.md").write_text("x")
    tracking.log_model_card(run_id, tmp_path / "card.md", "# A\n" + "a" * 5000 + "\n## B\n" + "b" * 5000, "export")
    note = tracking.client.get_run(run_id).data.tags["mlflow.note.content"]
    assert note == "# A\n" + "a" * 5000 + "\n\nThe rest is in the artifact export/card.md.\n"


def unavailable_code() -> int:
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    return int(TEMPORARILY_UNAVAILABLE)

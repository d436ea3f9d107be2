"""The runs of a local database: the same without MLflow and by MLflow."""

import math
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking import database as module
from firstlight.pipeline.tracking.database import read_runs
from firstlight.pipeline.tracking.lineage import Lineage, read_lineage
from firstlight.pipeline.tracking.location import TrackingLocation, parse_location
from tests.support.mlflow_runs import Past, chain


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> tuple[Past, dict[str, str]]:
    made, runs = chain(tmp_path_factory.mktemp("past"))
    client = made.tracking.client
    client.log_metric(runs["evaluate0"], "broken", math.nan)
    client.log_metric(runs["evaluate0"], "again", 1.0)
    client.log_metric(runs["evaluate0"], "again", 2.0, step=1)
    deleted = client.create_run(made.tracking.experiment_id, run_name="deleted").info.run_id
    client.delete_run(deleted)
    client.create_run(made.tracking.experiment_id, run_name="of another program")
    return made, runs


def locate(past: tuple[Past, dict[str, str]]) -> TrackingLocation:
    return parse_location([f"storage={past[0].storage}"])


def refuse_mlflow(location: TrackingLocation) -> tuple[Lineage, Any]:
    raise AssertionError("MLflow was asked")


def list_facts(lineage: Lineage) -> tuple[Any, ...]:
    """All facts in their order; values that are not equal to themselves as texts."""
    runs = [
        {**asdict(run), "metrics": {key: repr(value) for key, value in run.metrics.items()}}
        for run in lineage.runs.values()
    ]
    return lineage.location, lineage.experiment_id, runs, lineage.versions


def test_runs_are_those_that_mlflow_reads(past: tuple[Past, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = read_lineage(locate(past))
    monkeypatch.setattr(module, "read_lineage", refuse_mlflow)
    found = read_runs(locate(past))
    assert list_facts(found) == list_facts(expected)
    assert list(found.runs) == list(expected.runs)
    assert len(found.runs) > 5
    assert found.versions
    assert {run.name for run in found.runs.values()} >= {"of another program"}
    assert math.isnan(found.runs[past[1]["evaluate0"]].metrics["broken"])


@pytest.mark.parametrize("change", ["revision", "no database", "experiment"])
def test_mlflow_reads_runs_if_the_database_is_not_known(
    past: tuple[Past, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    location, asked = locate(past), list[TrackingLocation]()
    expected = read_lineage(location)
    monkeypatch.setattr(module, "read_lineage", lambda where: asked.append(where) or expected)
    if change == "revision":
        monkeypatch.setattr(module, "KNOWN_REVISION", "another")
    elif change == "experiment":
        location = replace(location, experiment="another")
    else:
        assert location.database is not None
        (tmp_path / "mlflow.db").write_bytes(b"no database, but a file of some other program")
        location = parse_location([f"storage={tmp_path}"])
    assert read_runs(location) is expected[0]
    assert asked == [location]


def test_revision_is_that_of_the_installed_mlflow(past: tuple[Past, dict[str, str]]) -> None:
    """Otherwise every list of runs takes the seconds of MLflow's import: read the tables of the new revision."""
    database = locate(past).database
    assert database is not None
    with sqlite3.connect(database) as opened:
        assert opened.execute("SELECT version_num FROM alembic_version").fetchall() == [(module.KNOWN_REVISION,)]


def test_missing_database_is_a_one_line_error_and_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was run in storage"):
        read_runs(parse_location([f"storage={tmp_path}"]))
    assert not list(tmp_path.iterdir())

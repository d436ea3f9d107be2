"""The runs of a local database of MLflow, read without MLflow, whose import takes seconds.

The tables are those of one state of MLflow's migrations. In another state, and behind a server, MLflow reads the runs.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firstlight.pipeline.tracking.lineage import (
    COMPOSITE_KINDS,
    Lineage,
    ModelVersion,
    Run,
    find_run_kind,
    find_store_hash,
    read_lineage,
)
from firstlight.pipeline.tracking.location import TrackingLocation

# The value of MLflow's table `alembic_version` for the tables that are read here.
KNOWN_REVISION = "dc11669786a5"
# Runs of the experiment that are not deleted, as MLflow lists them.
RUNS_QUERY = (
    "SELECT run_uuid, name, status, start_time, end_time, artifact_uri FROM runs "
    "WHERE experiment_id = ? AND lifecycle_stage = 'active' ORDER BY start_time DESC, run_uuid"
)
# Models in the order in which a run logged them; data sets likewise.
OUTPUTS_QUERY = (
    "SELECT source_id, destination_id FROM inputs "
    "WHERE source_type = 'RUN_OUTPUT' AND destination_type = 'MODEL_OUTPUT' ORDER BY rowid DESC"
)
INPUTS_QUERY = (
    "SELECT inputs.destination_id, datasets.dataset_source FROM inputs "
    "JOIN datasets ON datasets.dataset_uuid = inputs.source_id "
    "WHERE inputs.source_type = 'DATASET' AND inputs.destination_type = 'RUN' ORDER BY inputs.rowid"
)
VERSIONS_QUERY = (
    "SELECT name, version, run_id FROM model_versions WHERE current_stage != 'Deleted_Internal' "
    "ORDER BY last_updated_time DESC, name, version DESC"
)


def read_runs(location: TrackingLocation) -> Lineage:
    """Returns the lineage of all runs at a location, as `read_lineage`.

    Raises:
        UserError: as `read_lineage`.
    """
    if location.database is not None and location.database.exists():
        with contextlib.suppress(sqlite3.Error), _open_database(location.database) as database:
            found = _read_tables(database, location)
            if found is not None:
                return found
    return read_lineage(location)[0]


@contextlib.contextmanager
def _open_database(file: Path) -> Iterator[sqlite3.Connection]:
    """Opens a database for reading."""
    database = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
    try:
        # One transaction: a run that is being written is read as a whole.
        database.execute("BEGIN")
        yield database
    finally:
        database.close()


def _read_tables(database: sqlite3.Connection, location: TrackingLocation) -> Lineage | None:
    """Returns None if the tables are others, or lack the experiment."""
    if database.execute("SELECT version_num FROM alembic_version").fetchall() != [(KNOWN_REVISION,)]:
        return None
    row = database.execute("SELECT experiment_id FROM experiments WHERE name = ?", (location.experiment,)).fetchone()
    if row is None:
        return None
    experiment = row[0]
    runs = {run.id: run for run in _read_runs(database, experiment)}
    aliases: dict[tuple[str, str], list[str]] = {}
    for alias, version, name in database.execute("SELECT alias, version, name FROM registered_model_aliases"):
        aliases.setdefault((name, str(version)), []).append(alias)
    versions = tuple(
        ModelVersion(name, str(version), run_id, tuple(sorted(aliases.get((name, str(version)), ()))))
        for name, version, run_id in database.execute(VERSIONS_QUERY)
    )
    return Lineage(location, str(experiment), runs, versions)


def _read_runs(database: sqlite3.Connection, experiment: Any) -> Iterator[Run]:
    tags, params, metrics = (_group_by_run(database, table) for table in ("tags", "params", "latest_metrics"))
    models = dict(database.execute(OUTPUTS_QUERY))
    sources: dict[str, list[str]] = {}
    for run_id, source in database.execute(INPUTS_QUERY):
        sources.setdefault(run_id, []).append(source)
    for run_id, name, status, start, end, artifact_uri in database.execute(RUNS_QUERY, (experiment,)):
        its_tags, its_params = tags.get(run_id, {}), params.get(run_id, {})
        kind = find_run_kind(its_tags)
        store = find_store_hash(kind, its_params, sources.get(run_id, ()))
        yield Run(
            run_id, name, kind, status, start / 1000, None if end is None else end / 1000,
            its_tags.get("mlflow.parentRunId"), store, None if kind in COMPOSITE_KINDS else models.get(run_id),
            its_tags, its_params, metrics.get(run_id, {}), artifact_uri,
        )  # fmt: skip


def _group_by_run(database: sqlite3.Connection, table: str) -> dict[str, dict[str, Any]]:
    """Returns the values of a table of keys and values by run and key."""
    value = "CASE WHEN is_nan THEN NULL ELSE value END" if table == "latest_metrics" else "value"
    found: dict[str, dict[str, Any]] = {}
    for run_id, key, its in database.execute(f"SELECT run_uuid, key, {value} FROM {table}"):  # noqa: S608
        found.setdefault(run_id, {})[key] = float("nan") if its is None and table == "latest_metrics" else its
    return found

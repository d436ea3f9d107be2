"""Connections to MLflow: its settings, the first connection to a database or server, and the experiment of a location.

MLflow takes seconds to import, so it is imported when the first connection is made.
"""

import contextlib
import importlib.metadata
import logging
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, cast

from firstlight.pipeline.code_cache import hash_sources, read_cached, write_cached
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_path, explain_denied_access, wait_for_lock
from firstlight.pipeline.tracking.location import TrackingLocation, make_sqlite_uri
from firstlight.pipeline.tracking.retry import RetryingClient, describe_failure, short_timeouts

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient

# MLflow's default of 7 retries takes minutes if the server is down.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

# MLflow's page shows an experiment of an unknown kind with traces and judges.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# A folder in memory, where the system has it, and the free bytes that a new database may need there.
MEMORY_FOLDER, DATABASE_BYTES = Path("/dev/shm"), 2**25  # noqa: S108
DATABASE_LOCK_FILE = ".mlflow.lock"
# The tables of a new database, kept in the user's cache folder: MLflow's migrations take a second.
TABLES_FACT = "mlflow-tables"
# Attempts of MLflow to open a database. Its pauses between ten of them, its default, add up to 100 seconds.
DATABASE_ATTEMPTS = 5


def check_uri(uri: str) -> None:
    """Checks that MLflow can keep runs under `uri`.

    Raises:
        UserError: `uri` is a folder; names `tracking.uri`.
    """
    if uri.startswith("file:") or "://" not in uri:
        valid = "MLflow keeps runs in a database or behind a server: sqlite:///... or http://..."
        raise UserError(f"tracking.uri: {uri!r} is not valid: {valid}")


def connect_client(uri: str) -> "MlflowClient":
    """Returns a client of MLflow at `uri`, with MLflow's loggers silenced.

    MLflow's functions that take no client use `uri` from now on.
    """
    import mlflow

    _configure_mlflow()
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(uri)


def _configure_mlflow() -> None:
    """Silences the loggers of MLflow and of its migrations, and limits how often it tries to open a database.

    MLflow's import configures the loggers, so it must come first. At ERROR, MLflow would print the traceback of every
    failed statement, also of those that are repeated.
    """
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = min(utils.MAX_RETRY_COUNT, DATABASE_ATTEMPTS)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def open_experiment(location: TrackingLocation) -> tuple["MlflowClient", str]:
    """Returns a client of MLflow at a location, and the id of its experiment. Both are created if they do not exist.

    Raises:
        UserError: the server or database cannot be used; names `tracking.uri`.
    """
    check_uri(location.uri)
    try:
        lock = _database_folder(location) / DATABASE_LOCK_FILE
        lock.parent.mkdir(parents=True, exist_ok=True)
        # Two first users of one SQLite file would both create its tables without the lock.
        with short_timeouts(), wait_for_lock(lock):
            if location.database is not None:
                _check_database(location.database)
            if location.database is not None and not location.database.exists():
                _create_database(location.database)
            client = connect_client(location.uri)
            return client, _find_or_create_experiment(cast("MlflowClient", RetryingClient(client)), location)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"tracking.uri: {location.uri!r} cannot be used: {describe_failure(error)}") from None


def _database_folder(location: TrackingLocation) -> Path:
    """Returns the folder of the database, so that all users of one database use one lock."""
    return location.storage if location.database is None else location.database.resolve().parent


def _check_database(database: Path) -> None:
    """Checks that this user can write a database, before a run does work that could not be recorded.

    Raises:
        UserError: names the file and its owner.
    """
    # SQLite writes its journal beside the file.
    for path in (database, database.parent):
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"tracking.uri: {explain_denied_access(path)}")


def _create_database(database: Path) -> None:
    """Creates MLflow's tables under a temporary name, so that a killed process leaves no half-made database."""
    key = _hash_migrations()
    if _create_from_kept_tables(database, key):
        return
    with atomic_path(database) as temporary:
        _let_mlflow_create(database, temporary)
    # If they cannot be kept, the next new database takes a second longer.
    with contextlib.suppress(sqlite3.Error):
        write_cached(TABLES_FACT, key, {"script": _dump_tables(database)})


def _create_from_kept_tables(database: Path, key: str) -> bool:
    """Returns False if no database of this version of MLflow was made yet, or what is kept of it is of no use."""
    script = (read_cached(TABLES_FACT, key) or {}).get("script")
    if not isinstance(script, str) or not script:
        return False
    try:
        with atomic_path(database) as temporary, contextlib.closing(sqlite3.connect(temporary)) as made:
            made.executescript(script)
    except sqlite3.Error:
        return False
    return True


def _let_mlflow_create(database: Path, temporary: Path) -> None:
    """Has MLflow make its tables in memory, by some hundred migrations, and copies them to `temporary`.

    SQLite would wait for the disk after each of their statements.
    """
    import mlflow

    _configure_mlflow()
    has_room = os.access(MEMORY_FOLDER, os.W_OK) and shutil.disk_usage(MEMORY_FOLDER).free > DATABASE_BYTES
    memory = MEMORY_FOLDER if has_room else database.parent
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        made = Path(folder) / database.name
        mlflow.MlflowClient(make_sqlite_uri(made)).search_experiments()
        shutil.copyfile(made, temporary)


def _hash_migrations() -> str:
    """Returns the hash of all that decides MLflow's tables."""
    import mlflow

    store = Path(mlflow.__file__).parent / "store"
    files = [*store.glob("db_migrations/**/*.py"), *store.glob("**/dbmodels/*.py"), Path(__file__)]
    versions = [importlib.metadata.version(name) for name in ("sqlalchemy", "alembic")]
    return hash_sources(files, mlflow.__version__, *versions)


def _dump_tables(file: Path) -> str:
    """Returns a script that makes the tables of a new database, without the experiment that MLflow adds by itself.

    The folder of that one is a folder of the process that makes it.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as copy:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.backup(copy)
        copy.execute("DELETE FROM experiments")
        copy.commit()
        return "\n".join(copy.iterdump())


def _find_or_create_experiment(client: "MlflowClient", location: TrackingLocation) -> str:
    import mlflow

    name = location.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    folder = None if location.database is None else location.artifacts
    try:
        return str(client.create_experiment(name, folder, EXPERIMENT_TAGS))
    except mlflow.MlflowException:
        # Another process may have created it on a server since.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def measure_round_trip(location: TrackingLocation, tag: str) -> tuple[float, bool]:
    """Writes a tag of the experiment and reads it back. Creates nothing.

    Returns the seconds that it took, and False if the experiment does not exist. Raises whatever MLflow raises.
    """
    started, stamp = time.monotonic(), uuid.uuid4().hex
    with short_timeouts():
        client = RetryingClient(connect_client(location.uri))
        experiment = client.get_experiment_by_name(location.experiment)
        if experiment is not None:
            client.set_experiment_tag(experiment.experiment_id, tag, stamp)
            assert client.get_experiment(experiment.experiment_id).tags.get(tag) == stamp
    return time.monotonic() - started, experiment is not None

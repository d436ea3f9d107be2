"""Fills new SQLite databases of MLflow by a copy of a template: its migrations take a second for each database."""

import functools
import sqlite3
from pathlib import Path
from typing import Any

import pytest

# The database that new ones of this process are copied from.
current_template: Path | None = None


def make_template(file: Path) -> Path:
    """Lets MLflow create all its tables in a new database; returns the file."""
    import mlflow

    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


def copy_tables_from(template: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes MLflow fill every new SQLite database of this process with the tables and rows of `template`."""
    global current_template
    import mlflow.store.db.utils
    import mlflow.store.model_registry.sqlalchemy_store

    def initialize(engine: Any) -> None:
        with sqlite3.connect(template) as source, engine.connect() as target:
            source.backup(target.connection.driver_connection)

    newest = functools.cache(mlflow.store.db.utils._get_latest_schema_revision)
    current_template = template
    patch.setattr(mlflow.store.db.utils, "_initialize_tables", initialize)
    patch.setattr(mlflow.store.model_registry.sqlalchemy_store, "_initialize_tables", initialize)
    patch.setattr(mlflow.store.db.utils, "_get_latest_schema_revision", newest)

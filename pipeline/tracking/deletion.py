"""Deletes runs with their models and artifacts from MLflow."""

import contextlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from firstlight.pipeline.tracking.lineage import Lineage, ModelVersion, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient


def find_logged_models(lineage: Lineage, client: "MlflowClient", run: Run) -> list[str]:
    """Returns the ids of the models that a run has logged, whether finished or not."""
    models = client.search_logged_models([lineage.experiment_id], f"source_run_id = '{run.id}'")
    return [str(model.model_id) for model in models]


def delete_records(
    lineage: Lineage,
    client: "MlflowClient",
    runs: Sequence[Run],
    versions: Sequence[ModelVersion],
    model_ids: Sequence[str],
) -> None:
    """Deletes runs, versions of registered models and logged models, with their artifacts.

    From a local database, the rows are removed too. On a server, its operator removes them by `mlflow gc`.
    """
    for version in versions:
        client.delete_model_version(version.name, version.version)
        if not client.search_model_versions(f"name={_quote_text(version.name)}"):
            client.delete_registered_model(version.name)
    folders = [_find_local_folder(run.artifact_uri, run.id) for run in runs]
    for model_id in model_ids:
        folders.append(_find_local_folder(client.get_logged_model(model_id).artifact_location, model_id))
        client.delete_logged_model(model_id)
    for run in reversed(runs):
        client.delete_run(run.id)
    if lineage.location.database:
        _collect_garbage(lineage.location.uri, [run.id for run in runs], model_ids)
        # MLflow decodes %20 in a path twice, and leaves the artifacts of a storage that is called so.
        for folder in filter(None, folders):
            shutil.rmtree(folder, ignore_errors=True)
    else:
        _delete_artifacts(runs)


def _find_local_folder(uri: str, owner: str) -> Path | None:
    """Returns the folder on this machine that a URI stands for; None if there is none, or it is not that of `owner`."""
    path = Path(unquote(urlsplit(uri).path)) if uri.startswith("file:") else Path(uri)
    return path if owner in path.parts and path.is_dir() else None


def _quote_text(text: str) -> str:
    """Returns a text as MLflow's filters take it. A text with both kinds of quotes cannot be given."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _collect_garbage(uri: str, run_ids: Sequence[str], model_ids: Sequence[str]) -> None:
    """Removes the rows and the artifacts of deleted runs and models from a local database, by `mlflow gc`."""
    from mlflow.cli import gc

    arguments = ["--backend-store-uri", uri, "--tracking-uri", uri, "--run-ids", ",".join(run_ids)]
    arguments += ["--logged-model-ids", ",".join(model_ids)] if model_ids else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        gc.main(arguments, standalone_mode=False)


def _delete_artifacts(runs: Sequence[Run]) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    for run in runs:
        with contextlib.suppress(MlflowException, OSError):
            get_artifact_repository(run.artifact_uri).delete_artifacts()

"""References to encoders in MLflow, `runs:/...` and `models:/...`: their versions, their runs, and their files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.tracking.connection import open_experiment
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.retry import TrackingUnavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_ID_LENGTH = 32


class ReferenceReader(Protocol):
    """The experiment through which references are read: a `TrackingClient` or an `OpenedExperiment`."""

    client: "MlflowClient"
    experiment_id: str
    uri: str


@dataclass
class OpenedExperiment:
    """An experiment that is read without a recipe."""

    client: "MlflowClient"
    experiment_id: str
    uri: str

    @classmethod
    def open(cls, location: TrackingLocation) -> "OpenedExperiment":
        """Connects to MLflow at a location where something was run before. Creates no database.

        Raises:
            UserError: nothing was run there, or the server or database cannot be used; names `tracking.uri`.
        """
        if location.database is not None and not location.database.exists():
            raise UserError(f"tracking.uri: {location.uri!r} does not exist: nothing was run in {location.storage}")
        return cls(*open_experiment(location), location.uri)


def pin_reference(tracking: ReferenceReader, reference: str, where: str) -> str:
    """Returns a reference that always means the same files. `where` is the key that errors name.

    An alias can move, so `models:/name@alias` becomes `models:/name/version`. A run may be given by the beginning of
    its id, as in `runs:/4c81ab12/encoder`, which becomes the whole id.

    Raises:
        UserError: there is no such model, alias or run.
    """
    import mlflow

    kind, _, path = reference.partition(":/")
    name, at, alias = path.partition("@")
    try:
        if kind == "runs":
            return _complete_run_id(tracking, reference, where)
        if not at:
            return reference
        return f"models:/{name}/{tracking.client.get_model_version_by_alias(name, alias).version}"
    except (mlflow.MlflowException, TrackingUnavailable) as error:
        raise _missing_error(tracking, reference, where, error) from None


def _complete_run_id(tracking: ReferenceReader, reference: str, where: str) -> str:
    beginning, _, path = reference.removeprefix("runs:/").partition("/")
    if len(beginning) == RUN_ID_LENGTH or not beginning.isalnum():
        return reference
    condition = f"attributes.run_id LIKE '{beginning}%'"
    found = [run.info.run_id for run in tracking.client.search_runs([tracking.experiment_id], condition, max_results=2)]
    if len(found) != 1:
        count = "several runs begin" if found else "no run begins"
        raise UserError(f"{where}: {reference!r}: {count} with {beginning!r} in {tracking.uri}")
    return f"runs:/{found[0]}/{path}"


def find_companion(tracking: ReferenceReader, reference: str, name: str, where: str) -> str:
    """Returns `runs:/<run>/<name>`, the reference of another network that the run of an encoder has exported.

    Raises:
        UserError: the run has none of this name; names the run, and those that it has.
    """
    import mlflow

    try:
        run_id = find_source_run(tracking, reference)
        entries = tracking.client.list_artifacts(run_id)
    except (mlflow.MlflowException, TrackingUnavailable) as error:
        raise _missing_error(tracking, reference, where, error) from None
    names = sorted(entry.path for entry in entries if entry.is_dir and entry.path != "figures")
    if name not in names:
        valid = f"run {run_id}, which made {reference!r}, has {', '.join(names) or 'nothing'}"
        raise UserError(f"{where}: {name!r} is not valid: {valid}")
    return f"runs:/{run_id}/{name}"


def find_source_run(tracking: ReferenceReader, reference: str) -> str:
    """Returns the id of the run that made what a pinned reference refers to."""
    kind, _, path = reference.partition(":/")
    name, _, version = path.partition("/")
    if kind == "runs":
        return name
    if version:
        return str(tracking.client.get_model_version(name, version).run_id)
    return str(tracking.client.get_logged_model(name).source_run_id)


def fetch_reference(tracking: ReferenceReader, reference: str, target: Path, where: str) -> Path:
    """Downloads what a reference refers to into the folder `target`, and returns the path of the copy.

    Raises:
        UserError: it does not exist; names `where` and the reference.
    """
    import mlflow

    target.mkdir(parents=True, exist_ok=True)
    try:
        return Path(
            mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=str(target), tracking_uri=tracking.uri)
        )
    except Exception as error:
        raise _missing_error(tracking, reference, where, error) from None


def _missing_error(tracking: ReferenceReader, reference: str, where: str, error: Exception) -> UserError:
    return UserError(f"{where}: {reference!r} is not in {tracking.uri}: {one_line(error)}")


def read_json_artifact(run: Run, path: str) -> Any:
    """Returns the content of a JSON file among the artifacts of a run. Raises whatever MLflow raises."""
    import mlflow

    return mlflow.artifacts.load_dict(f"{run.artifact_uri}/{path}")

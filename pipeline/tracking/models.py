"""MLflow's model registry: versions of encoders and fine-tuned models under a name, and aliases that refer to them."""

import contextlib
from typing import TYPE_CHECKING

from firstlight.pipeline.errors import UserError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The alias of the last model that a recipe registered under a name.
CURRENT_ALIAS = "current"


def register_model(client: "MlflowClient", name: str, model_id: str, run_id: str, alias: str = CURRENT_ALIAS) -> str:
    """Registers a logged model under a name, and moves `alias` to its version.

    A model that is registered under this name already keeps its version. Returns `models:/<name>/<version>`.
    """
    import mlflow

    # It may exist.
    with contextlib.suppress(mlflow.MlflowException):
        client.create_registered_model(name)
    known = [v.version for v in client.search_model_versions(f"name='{name}'") if v.run_id == run_id]
    version = (
        known[0]
        if known
        else client.create_model_version(name, f"models:/{model_id}", run_id=run_id, model_id=model_id).version
    )
    client.set_registered_model_alias(name, alias, str(version))
    return f"models:/{name}/{version}"


def describe_versions(client: "MlflowClient", run_id: str, text: str) -> None:
    """Makes `text` the description of every registered version of the model of a run."""
    for version in client.search_model_versions(f"run_id='{run_id}'"):
        client.update_model_version(version.name, version.version, text)


def promote_model(client: "MlflowClient", name: str, model_id: str, run_id: str, alias: str) -> str:
    """Registers a logged model under a name and an alias. Returns the reference for recipes, `models:/<name>@<alias>`.

    Raises:
        UserError: MLflow refuses the alias; names the option `--alias`.
    """
    import mlflow

    try:
        register_model(client, name, model_id, run_id, alias)
    except mlflow.MlflowException as error:
        raise UserError(f"--alias: {alias!r} is not valid: {one_line(error)}") from None
    return f"models:/{name}@{alias}"

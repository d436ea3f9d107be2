"""`firstlight promote`: a name and an alias in the registry for the encoder of a pretraining."""

import re
from typing import TYPE_CHECKING

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.client import register
from firstlight.pipeline.tracking.lineage import Lineage, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def promote(lineage: Lineage, client: "MlflowClient", run: Run, name: str, alias: str) -> str:
    """The reference by which recipes can take it from now on: `models:/<name>@<alias>`.

    Raises:
        UserError: the run made no encoder, has not finished, or made several; a name that is not valid.
    """
    import mlflow

    if not NAME.fullmatch(name):
        raise UserError(
            f"--name: {name!r} is not valid; valid: letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    made_by = encoder_of(lineage, run)
    if made_by.status != "FINISHED" or made_by.model is None:
        raise UserError(f"run: {made_by.name} ({made_by.short}) has not finished: it has no encoder to promote")
    try:
        register(client, name, made_by.model, made_by.id, alias)
    except mlflow.MlflowException as error:
        raise UserError(f"--alias: {alias!r} is not valid: {str(error).splitlines()[0][:200]}") from None
    return f"models:/{name}@{alias}"


def encoder_of(lineage: Lineage, run: Run) -> Run:
    """The pretraining that is meant: the run itself, or the first seed of the one pretraining stage of a recipe or trial.

    Raises:
        UserError: there is none, or several stages.
    """
    if not run.whole:
        if run.kind != "pretrain":
            raise UserError(
                f"run: {run.name} ({run.short}) is a run of kind {run.kind}, which makes no encoder; valid: a pretraining"
            )
        return run
    made = [stage for stage in lineage.stages(run) if stage.kind == "pretrain"]
    if len({stage.stage for stage in made}) != 1:
        told = ", ".join(f"{stage.name} ({stage.short})" for stage in made) or "none"
        raise UserError(f"run: {run.name} ({run.short}) has several pretrainings or none; give the id of one: {told}")
    return min(made, key=lambda stage: int(stage.params.get("seed", 0)))

"""`firstlight promote`: gives the encoder of a pretraining, or a fine-tuned model, a name and an alias in MLflow."""

import re
from typing import TYPE_CHECKING

from firstlight.pipeline.cli.history import read_seed
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.lineage import Lineage, Run
from firstlight.pipeline.tracking.models import promote_model

if TYPE_CHECKING:
    from firstlight.pipeline.tracking.connection import MlflowClient

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def promote_encoder(lineage: Lineage, client: "MlflowClient", run: Run, name: str, alias: str) -> str:
    """Registers the encoder of a run, and returns the reference for recipes: `models:/<name>@<alias>`.

    Raises:
        UserError: the run made no encoder or several, or has not finished; the name or the alias is not valid.
    """
    if not MODEL_NAME.fullmatch(name):
        valid = "letters, digits, '.', '_' and '-', beginning with a letter or digit"
        raise UserError(f"--name: {name!r} is not valid; valid: {valid}")
    pretraining = find_pretraining(lineage, run)
    if pretraining.status != "FINISHED" or pretraining.model is None:
        raise UserError(
            f"run: {pretraining.name} ({pretraining.short_id}) has not finished: it has no encoder to promote"
        )
    return promote_model(client, name, pretraining.model, pretraining.id, alias)


def find_pretraining(lineage: Lineage, run: Run) -> Run:
    """Returns the run itself, or the first seed of the only pretraining stage of a recipe or trial.

    Raises:
        UserError: the run is neither a pretraining nor a fine-tuning; or the recipe has no pretraining stage, or
            several.
    """
    if not run.is_composite:
        if not run.artifact:
            found = f"{run.name} ({run.short_id}) is a run of kind {run.kind}"
            raise UserError(f"run: {found}, which makes no encoder; valid: a pretraining or a fine-tuning")
        return run
    pretrainings = [stage for stage in lineage.list_stages(run) if stage.artifact == "encoder"]
    if len({stage.stage for stage in pretrainings}) != 1:
        listing = ", ".join(f"{stage.name} ({stage.short_id})" for stage in pretrainings) or "none"
        found = f"{run.name} ({run.short_id}) has several pretrainings or none"
        raise UserError(f"run: {found}; give the id of one: {listing}")
    return min(pretrainings, key=read_seed)

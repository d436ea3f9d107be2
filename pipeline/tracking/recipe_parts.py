"""Links from the run of a recipe in MLflow to the models that its stages have made."""

from collections.abc import Sequence

from firstlight.pipeline.tracking.client import TrackingClient


def link_models(tracking: TrackingClient, run_id: str, stage_runs: Sequence[str]) -> None:
    """Makes the models that the runs of stages have logged outputs of the recipe's run. A repetition adds nothing.

    They stay models of the runs that made them: the lineage, deletions and promotions go by those.
    """
    from mlflow.entities import LoggedModelOutput

    outputs = tracking.client.get_run(run_id).outputs
    known = {model.model_id for model in (outputs.model_outputs if outputs else None) or ()}
    made = dict.fromkeys(model for run in stage_runs if (model := tracking.find_model(run)) is not None)
    if new := [model for model in made if model not in known]:
        tracking.client.log_outputs(run_id, [LoggedModelOutput(model, 0) for model in new])

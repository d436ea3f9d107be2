"""Runs of the small recipe: what MLflow holds of them, and their recipe with two workers on Ray."""

from pathlib import Path
from typing import Any

import mlflow
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.tracking.location import TrackingLocation
from tests.support import recipes

QUIET = Console(quiet=True)


def runs_of(recipe: Recipe) -> dict[str, Any]:
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    experiment = client.get_experiment_by_name("firstlight")
    return {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}


def on_ray(storage: Path, **changes: Any) -> Recipe:
    scale = {"scale__workers": 2, "scale__cpus": 4, "scale__cpus_per_worker": 1.0, "scale__collective_timeout_s": 60}
    recipe = recipes.recipe(storage, **{**scale, **changes})
    del recipe.stages["evaluate"], recipe.stages["finetune"]
    return recipe

"""Fine-tunings of the digits: the task of an arm before its first step."""

from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.finetuning.arms import build_arm_task
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes

HEAD = {"name": "classify", "hidden": [12, 10], "norm": "none", "dropout": 0.5, "dropout_layers": "all", "bias": 0.1}
RESCALED = {
    "encoder": {"name": "convnet", "input": "gray", "norm": "batch", "width": 4, "depth": 2},
    "stages__finetune__task": HEAD,
    "stages__finetune__batch_norm": "fold",
    "stages__finetune__rescale": "new_layers",
    "stages__finetune__learning_rates": [],
    "stages__finetune__epochs": 3,
    "stages__finetune__checkpoint_every": 1,
}


def save_seen_encoder(folder: Path, spec: dict[str, Any]) -> tuple[Encoder, Path]:
    """Returns an encoder whose batch normalisations have seen images, and its artifact."""
    torch.manual_seed(7)
    encoder = Encoder(spec, 8).train()
    encoder(torch.rand(64, encoder.image_channels, 8, 8) ** 2)
    save_encoder(encoder, folder / "encoder", {})
    return encoder, folder / "encoder"


def start_arm(
    folder: Path, store: Store, arm: str, **changes: Any
) -> tuple[StageContext, Finetune, StageInstance, Task]:
    """Returns the task of an arm, before its first step."""
    recipe = recipes.recipe(folder, **changes)
    stage = recipe.stages["finetune"]
    assert isinstance(stage, Finetune)
    context = StageContext.create(recipe, store, on_ray=False)
    encoder = folder / "encoder"
    if not encoder.exists():
        save_seen_encoder(folder, recipe.network_spec)
    start = {"given" if arm == "given" else "encoder": encoder}
    instance = StageInstance("finetune", 3, "f", folder / "job", **start)
    instance.folder.mkdir(parents=True, exist_ok=True)
    return context, stage, instance, build_arm_task(context, stage, instance, arm)

"""The networks that a fine-tuning keeps: the model of the first arm, with filters and pictures of predictions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from firstlight.pipeline.config.measures import GIVEN_ARM, is_pretrained_arm
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.stages.artifacts.encoder_description import WEIGHTS_ORIGIN_KEY
from firstlight.pipeline.stages.artifacts.weights_origin import trace_weights
from firstlight.pipeline.stages.finetuning.job import load_eval_batch
from firstlight.pipeline.stages.finetuning.views import describe_preprocessing
from firstlight.pipeline.stages.pictures import FILTERS_FILE, save_filters
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FOLDER, save_model
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.downstream.task import Task

# The number of test images in a picture.
NUM_PREDICTED_IMAGES = 4


@torch.no_grad()
def save_predictions(context: StageContext, stage: Finetune, task: Task, file: Path) -> None:
    """Saves the task's pictures of test images, or of held-out images where the recipe leaves the test split alone."""
    ids = context.splits.with_target(
        context.splits.test if context.recipe.score_test else context.splits.val, task.target
    )
    chosen = select_evenly_spaced(ids, NUM_PREDICTED_IMAGES)
    shown = task.eval().draw_predictions(load_eval_batch(context, stage, chosen)) if len(chosen) else {}
    if shown:
        write_atomically(file, save_tensors({caption: image.cpu().contiguous() for caption, image in shown.items()}))


def save_arm_models(
    context: StageContext, stage: Finetune, instance: StageInstance, tasks: Mapping[str, Task], result: dict[str, Any]
) -> None:
    """Saves the model of the first arm, and what figures need of the fine-tuned networks, which are given by arm."""
    if stage.task.train == "all":
        filters = {arm: task.encoder.compose_first_filters() for arm, task in tasks.items()}
        save_filters(filters, instance.folder / FILTERS_FILE)
    arm = stage.compared_arms[0]
    save_model(
        tasks[arm],
        stage.task,
        instance.folder / MODEL_FOLDER,
        classes=context.store.classes,
        preprocessing=describe_preprocessing(context, stage),
        batch_norm=stage.batch_norm,
        facts={
            "arm": arm,
            "lr": result[arm]["lr"],
            "labels": result["labels"],
            "store": context.store.hash,
            "seed": instance.seed,
            **_trace_arm(context, instance, arm),
        },
    )


def _trace_arm(context: StageContext, instance: StageInstance, arm: str) -> dict[str, Any]:
    """Returns what is known of the existing weights that an arm comes from, as a fact of its model; {} if of none."""
    folder = instance.given if arm == GIVEN_ARM else instance.encoder if is_pretrained_arm(arm) else None
    origin = trace_weights(context.recipe, instance.stage, folder, arm) if folder else {}
    return {WEIGHTS_ORIGIN_KEY: origin} if origin else {}

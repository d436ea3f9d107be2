"""The training of a fine-tuning: its images and their order."""

from pathlib import Path

import numpy as np
import torch

from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.learner import Batch


def finetune_ids(context: StageContext, stage: Finetune, instance: StageInstance) -> np.ndarray:
    """Returns the sorted ids of the labelled training images of an instance's seed."""
    return context.splits.labelled_subset(stage, instance.seed, TASKS[stage.task.name].target)


def build_finetune_job(
    context: StageContext, stage: Finetune, instance: StageInstance, folder: Path, rate: float
) -> TrainingJob:
    """Returns the training of a candidate with the learning rate `rate`, which writes into `folder`."""
    training = stage.model_copy(update={"optimizer": stage.optimizer.with_rate(rate)})
    plan = context.build_plan(finetune_ids(context, stage, instance), stage.batch_size, instance.seed)
    loader = context.build_loader(context.list_view_augments(stage), instance.seed, TASKS[stage.task.name].target)
    return TrainingJob(
        folder, training, plan, loader, instance.seed, context.options, context.device, withheld=plan.ids[:0]
    )


def load_eval_batch(
    context: StageContext, stage: Finetune, ids: np.ndarray, device: torch.device | None = None
) -> Batch:
    """Loads images with the evaluation augmentation and the task's target, onto `device`, by default the worker's."""
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0, TASKS[stage.task.name].target)
    return to_batch(loader.load_once(ids), device or context.device)

"""The training of a pretraining: its images, their order, and the method on its encoder."""

from pathlib import Path

import numpy as np
import torch

from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.plan import SemiSupervisedPlan, TrainingPlan
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.pretraining.views import list_views
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import batch_requirements, build_method
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo

# The stream of random numbers that separates the draw of unlabelled images from all others of the seed.
UNLABELLED_STREAM = 0x756E6C62

# Rows of the tables that are built to be measured or checked.
TABLE_ROWS = 1024


def batch_requirements_of(stage: Pretrain) -> BatchRequirements:
    return batch_requirements(stage.method.name, constructor_arguments(stage.method))


def build_job(context: StageContext, stage: Pretrain, instance: StageInstance) -> TrainingJob:
    """Returns the training of one seed."""
    train, labelled = context.splits.train, pretrain_label_ids(context, stage, instance.seed)
    withheld = np.setdiff1d(train, labelled, assume_unique=True)
    plan = _build_plan(context, stage, labelled, instance.seed)
    loader = build_view_loader(context, stage, instance.seed)
    place = instance.folder, stage, plan, loader, instance.seed, context.options, context.device
    return TrainingJob(*place, withheld, instance.begin, instance.until, stage.selection)


def pretrain_label_ids(context: StageContext, stage: Pretrain, seed: int) -> np.ndarray:
    """Returns the ids whose labels the method may see."""
    return context.splits.labelled_subset(stage, seed) if stage.labelled_per_batch else context.splits.train[:0]


def draw_unlabelled_ids(splits: Splits, stage: Pretrain, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Returns the sorted training ids that are seen beside the labelled ones."""
    rest = np.setdiff1d(splits.train, labelled, assume_unique=True)
    if stage.max_unlabelled is None:
        return rest
    return np.sort(np.random.default_rng((seed, UNLABELLED_STREAM)).permutation(rest)[: stage.max_unlabelled])


def _build_plan(context: StageContext, stage: Pretrain, labelled: np.ndarray, seed: int) -> TrainingPlan:
    if stage.labelled_per_batch == 0:
        return context.build_plan(context.splits.train, stage.batch_size, seed)
    if stage.labelled_per_batch == stage.batch_size:
        return context.build_plan(labelled, stage.batch_size, seed)
    rest = draw_unlabelled_ids(context.splits, stage, labelled, seed)
    return SemiSupervisedPlan(
        context.build_plan(labelled, stage.labelled_per_batch, seed),
        context.build_plan(rest, stage.batch_size - stage.labelled_per_batch, seed),
    )


def build_view_loader(context: StageContext, stage: Pretrain, seed: int) -> Loader:
    """Returns the loader of the method's views of an image."""
    augments, sizes = zip(*list_views(stage, context.recipe.dataset), strict=True)
    return context.build_loader(augments, seed, sizes=sizes)


def build_seeded_method(
    context: StageContext, stage: Pretrain, job: TrainingJob, start: Path | None = None, teacher: Path | None = None
) -> Method:
    """Builds the method on the encoder in the folder `start`, or on a fresh one. Fresh weights are drawn from the seed,
    those of the method's own layers too.

    `teacher`: the folder of the frozen encoder that the method learns from, if it does.
    """
    size = stage.choose_teacher_size(context.recipe.dataset.image_size)
    frozen = None if teacher is None else load_encoder(teacher, size)
    torch.manual_seed(job.seed)
    encoder = Encoder(context.recipe.network_spec, context.recipe.dataset.image_size)
    if start is not None:
        encoder.load_state_dict(load_encoder(start, encoder.image_size).state_dict())
    labels = torch.from_numpy(context.splits.labels[job.plan.ids])
    info = TrainingInfo(
        len(job.plan.ids),
        job.num_epochs,
        job.seed,
        len(context.store.classes),
        labels,
        job.total_steps,
        tuple(job.loader.size_of(view) for view in range(len(job.loader.ops))),
        frozen,
    )
    method = build_method(stage.method.name, encoder, info, constructor_arguments(stage.method))
    method.layer_decay = stage.layer_decay
    return method


def build_small_method(stage: Pretrain, encoder: Encoder, classes: int, view_sizes: tuple[int, ...] = ()) -> Method:
    """Builds the method over a small table.

    `view_sizes`: as in `TrainingInfo`.

    Raises:
        ValueError: its settings do not fit the encoder.
    """
    # The number of epochs decides no shape; with a length in steps it is not known before the images are.
    info = TrainingInfo(TABLE_ROWS, stage.epochs or 1, 0, classes, torch.full((TABLE_ROWS,), -1), view_sizes=view_sizes)
    return build_method(stage.method.name, encoder, info, constructor_arguments(stage.method))


def count_steps_per_epoch(stage: Pretrain, splits: Splits, seed: int) -> int:
    """Returns the number of steps in a whole epoch of the training of a seed."""
    images, batch = count_epoch_images(stage, splits, seed)
    return images // batch


def count_unlabelled(stage: Pretrain, rest: int) -> int:
    """Returns how many of the `rest`, the training images beside the labelled ones, the stage trains on."""
    return rest if stage.max_unlabelled is None else min(stage.max_unlabelled, rest)


def count_epoch_images(stage: Pretrain, splits: Splits, seed: int) -> tuple[int, int]:
    """Returns the number of images of an epoch of a seed, and of those in a batch that an epoch counts."""
    images, batch, labelled = len(splits.train), stage.batch_size, stage.labelled_per_batch
    if labelled == batch:
        return len(splits.labelled_subset(stage, seed)), batch
    if labelled:
        return count_unlabelled(stage, images - len(splits.labelled_subset(stage, seed))), batch - labelled
    return images, batch

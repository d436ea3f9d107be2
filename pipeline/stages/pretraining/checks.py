"""Checks of a pretraining against its images and its method, before anything starts."""

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.checks import count_labelled
from firstlight.pipeline.stages.pretraining.job import (
    batch_requirements_of,
    build_small_method,
    count_steps_per_epoch,
    count_unlabelled,
)
from firstlight.pipeline.stages.pretraining.views import check_views
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import check_method_images, check_method_length
from firstlight.tasks.pretrain.method import Method


def count_pretrain_images(where: str, stage: Pretrain, splits: Splits, seed: int) -> int:
    """Returns the number of images that the stage trains on."""
    if not stage.labelled_per_batch:
        return len(splits.train)
    labelled = count_labelled(where, stage, splits, seed, "label")
    rest = len(splits.train) - labelled
    if stage.max_unlabelled is not None and stage.max_unlabelled > rest:
        raise UserError(
            f"{where}.max_unlabelled: {stage.max_unlabelled} is more than the {rest} training images beside the "
            f"{labelled} labelled ones; valid: 1 to {rest}, or null"
        )
    return _check_mixture(where, stage, labelled, count_unlabelled(stage, rest))


def _check_mixture(where: str, stage: Pretrain, labelled: int, rest: int) -> int:
    """Checks a batch of labelled and unlabelled images. Returns how many images a semi-supervised pretraining trains
    on.
    """
    wanted = stage.batch_size - stage.labelled_per_batch
    if stage.labelled_per_batch > labelled:
        raise UserError(
            f"{where}.labelled_per_batch: {stage.labelled_per_batch} is more than the {labelled} labelled images "
            "there are"
        )
    if wanted > rest:
        raise UserError(
            f"{where}.labelled_per_batch: {stage.labelled_per_batch} leaves {wanted} images of a batch to the {rest} "
            "without a label that there are; "
            f"valid: fewer labels (e.g. a smaller labels_per_class), or {stage.batch_size} (labelled images only)"
        )
    return labelled + rest if wanted else labelled


def check_pretrain_method(where: str, stage: Pretrain, recipe: Recipe, encoder: Encoder, classes: int) -> Method:
    """Checks what batches hold against what the method needs. Returns the method, over a small table."""
    required, labelled = batch_requirements_of(stage), stage.labelled_per_batch
    if labelled > stage.batch_size:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is more than batch_size: {stage.batch_size}; valid: 0 to "
            f"{stage.batch_size}"
        )
    if required.labels and not labelled:
        raise UserError(
            f"{where}.labelled_per_batch: 0 is not valid: the method, as it is set, learns from labels; valid: 1 to "
            f"{stage.batch_size}"
        )
    if labelled and not required.labels:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is not valid: the method, as it is set, looks at no label; "
            "valid: 0"
        )
    if labelled and not classes:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is not valid: dataset.name {recipe.dataset.name!r} has no "
            "labels; valid: 0"
        )
    for key, value in stage.labels_given.items() if not labelled else ():
        raise UserError(f"{where}.{key}: {value!r} is not valid without labelled_per_batch; valid: null")
    if stage.max_unlabelled is not None and not 0 < labelled < stage.batch_size:
        raise UserError(
            f"{where}.max_unlabelled: {stage.max_unlabelled} is not valid with labelled_per_batch: {labelled}: a batch "
            "does not have both kinds of images; valid: null"
        )
    sizes = tuple(view.size for view in check_views(where, stage, recipe.dataset, encoder))
    try:
        if stage.epochs is not None:
            check_method_length(stage.method.name, stage.epochs, False, constructor_arguments(stage.method))
        return build_small_method(stage, encoder, classes, sizes)
    except ValueError as error:
        raise UserError(str(error) if str(error).startswith("encoder.") else f"{where}.method.{error}") from None


def check_pretrain_steps(where: str, stage: Pretrain, splits: Splits, seed: int) -> None:
    """Checks a length in steps against the method, which may need a number of whole epochs."""
    if stage.steps is None:
        return
    per_epoch = count_steps_per_epoch(stage, splits, seed)
    epochs, name = stage.length.count_epochs(per_epoch), stage.method.name
    try:
        check_method_length(name, epochs, stage.steps % per_epoch > 0, constructor_arguments(stage.method))
    except ValueError as error:
        raise UserError(f"{where}.method.{error}; {where}.steps: {stage.steps}, {per_epoch} in an epoch") from None


def check_pretrain_images(where: str, stage: Pretrain, images: int) -> None:
    """Checks the number of images that the stage trains on against the method's parameters."""
    try:
        check_method_images(stage.method.name, images, constructor_arguments(stage.method))
    except ValueError as error:
        raise UserError(f"{where}.method.{error}") from None

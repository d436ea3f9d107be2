"""Checks of a fine-tuning against its images, its task and its encoder, before anything starts."""

import copy

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.checks import check_class_names, check_made_network
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage_kind import RecipeContext
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.starting_weights import check_rescaling, fold_encoder
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder


def check_finetune_task(name: str, stage: Finetune, context: RecipeContext) -> None:
    """Checks the task, built once on the encoder, and the decoder that the pretraining before it makes."""
    where, recipe, cls = f"stages.{name}", context.recipe, TASKS[stage.task.name]
    _check_annotated(where, stage, recipe)
    encoder = copy.deepcopy(context.encoder)
    if stage.batch_norm == "fold":
        try:
            fold_encoder(encoder)
        except ValueError as error:
            raise UserError(f"{where}.batch_norm: 'fold' is not valid: {error}; valid: keep") from None
    try:
        task = cls(encoder, len(context.source.classes), **constructor_arguments(stage.task))
    except ValueError as error:
        raise UserError(f"{where}.task.{error}") from None
    if stage.rescale != "none":
        try:
            check_rescaling(task)
        except ValueError as error:
            raise UserError(f"{where}.rescale: '{stage.rescale}' is not valid: {error}; valid: none") from None
    source = recipe.encoder_source(name)
    if "pretrained_decoder" in stage.compared_arms and source is not None and source.stage is not None:
        networks = context.networks[source.stage]
        check_made_network(f"{where}.arms", "decoder", recipe, source.stage, networks)
        try:
            task.start_from(networks)
        except ValueError as error:
            raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None


def _check_annotated(where: str, stage: Finetune, recipe: Recipe) -> None:
    """Checks settings that a task on annotations (classes, masks, boxes) cannot have."""
    target = TASKS[stage.task.name].target
    if target != "mask" and stage.scored_pixels == "image":
        names = ", ".join(name for name, cls in TASKS.items() if cls.target == "mask")
        raise UserError(
            f"{where}.scored_pixels: 'image' is not valid: {stage.task.name} has no masks; valid: view, or "
            f"task.name: {names}"
        )
    if target == "label":
        return
    if stage.labels_per_class:
        raise UserError(
            f"{where}.labels_per_class: {stage.labels_per_class} is not valid: images have several classes; "
            "valid: labels_fraction"
        )
    if target in ("mask", "boxes") and stage.test_crops > 1:
        raise UserError(
            f"{where}.test_crops: {stage.test_crops} is not valid: crops of an image have {target} of their own; "
            "valid: 1"
        )
    if recipe.stream.resident == "on":
        raise UserError(
            f"stream.resident: 'on' is not possible for {where}: its images are streamed, with their {target}; "
            "valid: auto, off"
        )


def check_class_groups(where: str, stage: Finetune, classes: tuple[str, ...]) -> None:
    """Checks that the groups of classes have known classes, and the task a measure of each class."""
    cls = TASKS[stage.task.name]
    if stage.class_groups and cls.by_class is None:
        raise UserError(
            f"{where}.class_groups: is not valid: {cls.measure} of {stage.task.name} is no mean over classes; valid: "
            "leave it out"
        )
    for group, members in stage.class_groups.items():
        check_class_names(f"{where}.class_groups.{group}", members, classes)


def check_decoder(decoder: Decoder, stage: Finetune, recipe: Recipe, where: str) -> None:
    """Checks that the task has a place for a pretrained decoder.

    Raises:
        UserError: it has none, or one of another shape.
    """
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    try:
        TASKS[stage.task.name](encoder, 2, **constructor_arguments(stage.task)).start_from({"decoder": decoder})
    except ValueError as error:
        raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None

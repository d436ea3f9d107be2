"""Checks that several kinds of stages share. Each raises a UserError that names the dotted key, the value and the valid
values.
"""

from collections.abc import Mapping

from torch import nn

from firstlight.pipeline.config.comparison import FeatureStage
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import LabelBudget, TrainingOptions
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.stages.stage_kind import RecipeContext
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.task import TargetKind
from firstlight.tasks.nn.encoders import Encoder

TARGET_NAMES = {
    "label": "labels, one for an image",
    "present": "to know all classes of an image",
    "mask": "masks",
    "boxes": "boxes",
}


def check_target(where: str, target: TargetKind, context: RecipeContext, task: str | None = None) -> None:
    """Checks that the source has what the stage learns from: labels, or annotations of the kind `target`.

    `task`: the name of the stage's task, None if it has none.
    """
    dataset, source = context.recipe.dataset, context.source
    place = f"list {dataset.list!r}" if dataset.list else f"root {dataset.root!r}"
    has: tuple[str, ...] = source.annotations or (("label",) if source.classes else ())
    if target in has:
        if target == "label" and len(source.classes) == 1:
            raise UserError(
                f"{where}: all images of dataset.{place} are {source.classes[0]!r}: there is nothing to tell apart; "
                "valid: two classes or more"
            )
        return
    tasks = ", ".join(name for name, cls in TASKS.items() if cls.target in has)
    if tasks:
        valid = f"a finetune stage with task.name {tasks}"
    else:
        valid = "images in a folder per class, or a recipe with a pretrain stage only"
    name = f"{where}.task.name: {task!r}" if task else f"{where}:"
    found = f"{', '.join(has)} instead" if has else "none"
    raise UserError(f"{name} needs {TARGET_NAMES[target]}, and dataset.{place} has {found}; valid: {valid}")


def check_test_split(where: str, context: RecipeContext) -> None:
    """Checks that there are test images, unless the recipe leaves the test split alone or extends a store that may have
    some.
    """
    recipe = context.recipe
    if recipe.score_test and not context.source.splits.get("test") and not recipe.dataset.extends:
        fraction = recipe.dataset.test_fraction
        raise UserError(f"{where}: needs a test split; dataset.test_fraction: {fraction} leaves none")


def check_class_names(where: str, names: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Checks that each of `names` is a class of the data set."""
    for name in names:
        if name not in classes:
            valid = suggest_valid(name, classes) if classes else "it has none"
            raise UserError(f"{where}: {name!r} is no class of the data set; {valid}")


def name_encoder_maker(recipe: Recipe, stage: str) -> str:
    """Returns the method of a stage, or its kind if it has no method."""
    section = recipe.stages[stage]
    method = section.model_dump().get("method")
    return str(method["name"]) if method else section.kind


def check_made_network(where: str, wanted: str, recipe: Recipe, stage: str, networks: Mapping[str, nn.Module]) -> None:
    """Checks that the pretraining `stage` makes a network `wanted` besides its encoder. `networks`: those that it
    makes.
    """
    if wanted in networks:
        return
    method = name_encoder_maker(recipe, stage)
    asked = "'pretrained_decoder'" if wanted == "decoder" else f"{wanted!r}"
    others = f" but {', '.join(sorted(networks))}" if networks else ""
    valid = "pretrained, scratch" if wanted == "decoder" else "encoder"
    raise UserError(
        f"{where}: {asked} is not valid: {method} of stages.{stage} makes no {wanted}{others}; valid: {valid}"
    )


def check_made_table(where: str, wanted: str, context: RecipeContext, stage: str) -> None:
    """Checks that the pretraining `stage` keeps a table `wanted` of its images."""
    if wanted in context.tables.get(stage, ()):
        return
    method = name_encoder_maker(context.recipe, stage)
    what = {"bank": "memory bank"}.get(wanted, wanted)
    raise UserError(f"{where}: true is not valid: {method} of stages.{stage} keeps no {what}; valid: false")


def check_feature_layers(where: str, key: str, stage: FeatureStage, encoder: Encoder) -> None:
    """Checks the layers of a stage and their pooling against an encoder. `key`: the stage's key for its layers."""
    maps = len(encoder.shapes)
    for layer in stage.feature_layers:
        if not -maps <= layer < maps:
            raise UserError(
                f"{where}.{key}: {layer} is not one of the encoder's {maps} feature maps; valid: {-maps} to {maps - 1}"
            )
    if stage.pool in ("cls", "cls_avg") and not encoder.has_class_token:
        name = encoder.spec.get("model", encoder.spec["name"])
        raise UserError(f"{where}.pool: {stage.pool!r} needs a class token, and {name} has none; valid: avg, grid")
    if stage.features == "encoder":
        return
    wrong: dict[str, object] = {key: list(stage.feature_layers)} if stage.feature_layers != (-1,) else {}
    wrong |= {"pool": stage.pool} if stage.pool != "avg" else {}
    for name, value in wrong.items():
        raise UserError(
            f"{where}.{name}: {value} is not valid with features: head, which has one output; valid: leave it out"
        )


def check_head_source(name: str, stage: FeatureStage, context: RecipeContext) -> None:
    """Checks that the pretraining before the stage `name` makes the head that the stage takes its features from."""
    source = context.recipe.encoder_source(name)
    if stage.features == "head" and source is not None and source.stage is not None:
        check_made_network(
            f"stages.{name}.features", "head", context.recipe, source.stage, context.networks.get(source.stage, {})
        )


def check_scored_images(recipe: Recipe, splits: Splits, target: TargetKind) -> None:
    """Checks that every worker has at least one held-out and one test image whose target is known."""
    workers = max(recipe.scale.max_workers, 1)
    for part, ids in (("val", splits.val), *([("test", splits.test)] if recipe.score_test else [])):
        known = len(splits.with_target(ids, target))
        if known < workers:
            raise UserError(
                f"dataset.{part}_fraction: leaves {known} labelled {part} images for {workers} workers: too few"
            )


def count_labelled(where: str, stage: LabelBudget, splits: Splits, seed: int, target: TargetKind) -> int:
    """Returns the number of training images whose labels the stage learns from.

    Raises:
        UserError: a class has too few images, or there is no such subset.
    """
    try:
        return len(splits.labelled_subset(stage, seed, target))
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def check_batch_images(where: str, stage: TrainingOptions, images: int) -> None:
    """Checks that a batch is not larger than the number of images that the stage trains on."""
    if stage.batch_size > images:
        raise UserError(f"{where}.batch_size: {stage.batch_size} is more than the {images} images it would train on")

"""Checks of a recipe against the machine, the storage and the source of images, before Ray starts."""

import math

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.preparing.storage import check_storage
from firstlight.pipeline.run.ray_session import check_local_resources
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage_kind import RecipeContext
from firstlight.tasks.nn.encoders import Encoder


def check_recipe(recipe: Recipe, source: Source | None = None) -> Source:
    """Checks everything that can be known without Ray and without reading an image, except `tracking.loggers`.

    Returns the source of `recipe.dataset`, which is `source` if it is open already.

    Raises:
        UserError: names the dotted key, the value and the valid values.
    """
    check_local_resources(recipe.scale, recipe.stream)
    check_storage(recipe.storage)
    encoder = check_without_images(recipe)
    source = source or open_source(recipe.dataset)
    context = RecipeContext(recipe, source, encoder)
    for name, stage in recipe.stages.items():
        stage_kind(stage).check_source(name, stage, context)
    return source


def check_without_images(recipe: Recipe) -> Encoder:
    """Checks batch sizes, and that the encoder fits the stages. Returns the encoder, with fresh weights.

    Raises:
        UserError: as `check_recipe`.
    """
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainingOptions):
            _check_batch(f"stages.{name}", stage, recipe.scale)
    if recipe.encoder is None:
        raise UserError(
            "encoder: is missing; it is read from the encoders of the stages by `firstlight run` and not for searches "
            "and submitted jobs; valid here: the whole section, which the page of the encoder's run in MLflow shows"
        )
    encoder = _build_encoder(recipe)
    for name, stage in recipe.stages.items():
        stage_kind(stage).check_encoder(name, stage, recipe, encoder)
    return encoder


def _build_encoder(recipe: Recipe) -> Encoder:
    try:
        return Encoder(recipe.network_spec, recipe.dataset.image_size)
    except ValueError as error:
        keys = tuple(f"{key}: " for key in type(recipe.encoder).model_fields)
        if str(error).startswith(keys):
            raise UserError(f"encoder.{error}") from None
        raise UserError(f"dataset.image_size: {recipe.dataset.image_size} is not valid: {error}") from None


def _check_batch(where: str, stage: TrainingOptions, scale: ScaleOptions) -> None:
    """Checks that a batch divides evenly over every possible number of workers."""
    if scale.min_workers < scale.max_workers:
        shares = math.lcm(*range(scale.min_workers, scale.max_workers + 1)) * stage.accumulate
        if stage.batch_size % shares:
            near = max(stage.batch_size // shares, 1) * shares
            raise UserError(
                f"{where}.batch_size: {stage.batch_size} is not valid: it is the sum over scale.workers, "
                f"{scale.min_workers} to {scale.max_workers} of them, and must be a multiple of {shares}; "
                f"near it: {near}"
            )
        return
    workers = max(scale.max_workers, 1)
    if stage.batch_size % (workers * stage.accumulate):
        parts = f" and accumulate = {stage.accumulate} parts" if stage.accumulate > 1 else ""
        raise UserError(
            f"{where}.batch_size: {stage.batch_size} is not valid: it is the sum over scale.workers = {workers} "
            f"workers{parts} and must be a multiple of {workers * stage.accumulate}"
        )

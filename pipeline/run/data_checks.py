"""Checks of a recipe against its prepared images: enough of them for its batches and its labels, for every seed."""

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.stages.registry import stage_kind


def check_images(recipe: Recipe, splits: Splits) -> None:
    """Checks every stage against the images of the store.

    Raises:
        UserError: a batch is larger than its images, a class has too few images, a subset does not exist, a held-out part is empty.
    """
    for name, stage in recipe.stages.items():
        stage_kind(stage).check_images(name, stage, recipe, splits)

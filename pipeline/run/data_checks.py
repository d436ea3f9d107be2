"""Checks of a recipe against its prepared images, for every seed: there must be enough for its batches and labels."""

from collections.abc import Mapping
from pathlib import Path

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.stages.registry import stage_kind


def check_images(recipe: Recipe, splits: Splits) -> None:
    """Checks every stage against the images of the store.

    Raises:
        UserError: a batch has more images than there are, a class has too few, a subset does not exist, or the held-out
            split is empty.
    """
    for name, stage in recipe.stages.items():
        stage_kind(stage).check_images(name, stage, recipe, splits)


def check_companion_images(
    recipe: Recipe, companions: Mapping[str, Mapping[str, Path]], store: str, splits: Splits
) -> None:
    """Checks what stages need besides encoders from MLflow against the images of the store with the hash `store`.

    `companions`: the folders of these artifacts, by the name of the stage and their own.

    Raises:
        UserError: a table is of other images.
    """
    for name, folders in companions.items():
        stage = recipe.stages[name]
        stage_kind(stage).check_companion_images(name, stage, folders, store, splits)

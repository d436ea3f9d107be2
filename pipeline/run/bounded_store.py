"""The shorter side that the images of a recipe's store need, by all of its views: `dataset.store_size: auto`."""

from collections.abc import Iterator

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import Augment
from firstlight.pipeline.config.scoring_views import ScoringViews
from firstlight.pipeline.config.stages import StageConfig, TrainingOptions
from firstlight.pipeline.data.prepare.store_side import find_auto_side


def find_recipe_side(recipe: Recipe) -> int | None:
    """Returns the side that `auto` stands for in a recipe, None if its images must keep their size."""
    return find_auto_side((augment[0].model_dump(), size) for augment, size in _list_recipe_views(recipe))


def _list_recipe_views(recipe: Recipe) -> Iterator[tuple[Augment, int]]:
    """Yields the augmentation and the side in pixels of the views of all stages, and of the section `dataset`.

    Recipes that train on a data set, and those that only embed it, then have one store.
    """
    data = recipe.dataset
    yield data.eval_augment, data.image_size
    yield data.train_augment, data.image_size
    for stage in recipe.stages.values():
        yield from _list_stage_views(stage, data)
        if isinstance(stage, ScoringViews):
            for augment in stage.build_corner_crops():
                yield augment, data.image_size


def _list_stage_views(stage: StageConfig, data: DatasetOptions) -> Iterator[tuple[Augment, int]]:
    """Yields the views of a stage; where its section tells their crops, one stands for all."""
    if stage.has_plain_crops:
        if isinstance(stage, TrainingOptions):
            yield stage.augment or data.train_augment, data.image_size
        return
    # Kinds of stages need torch, whose import is waited for only here.
    from firstlight.pipeline.stages.registry import stage_kind

    yield from stage_kind(stage).list_views(stage, data)

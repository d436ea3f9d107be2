"""Images are scored in the views that the stage names, and the model sees images in the same."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning.views import describe_preprocessing, list_scored_views
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes


def open_stage(folder: Path, store: Store, **changes: Any) -> tuple[StageContext, Any]:
    """Returns the stage `finetune` of the small recipe with changes of its keys, and its images."""
    recipe = recipes.recipe(folder, **{f"stages__finetune__{key}": value for key, value in changes.items()})
    return StageContext.create(recipe, store, on_ray=False), recipe.stages["finetune"]


def test_default_view_is_that_of_the_evaluation_augmentation(tmp_path: Path, digits: Store) -> None:
    context, stage = open_stage(tmp_path, digits)
    assert list_scored_views(context, stage) == [context.recipe.dataset.eval_augment]


def test_random_crops_are_those_of_the_training(tmp_path: Path, digits: Store) -> None:
    context, stage = open_stage(tmp_path, digits, test_crops=10, test_crop="random")
    assert list_scored_views(context, stage) == [context.recipe.dataset.train_augment] * 10


def test_corner_crops_are_five_places_and_their_mirror_images(tmp_path: Path, digits: Store) -> None:
    context, stage = open_stage(tmp_path, digits, test_crops=10, test_scale=0.75)
    views = list_scored_views(context, stage)
    assert views == stage.build_corner_crops()
    assert len({str(view) for view in views}) == 10


@pytest.mark.parametrize("changes", [{}, {"test_crops": 10}], ids=["one view", "ten crops"])
def test_model_sees_images_in_the_views_that_were_scored(
    tmp_path: Path, digits: Store, changes: dict[str, Any]
) -> None:
    context, stage = open_stage(tmp_path, digits, **changes)
    seen = describe_preprocessing(context, stage)
    expected = [[op.model_dump(mode="json") for op in ops] for ops in list_scored_views(context, stage)]
    assert [list(ops) for ops in seen.views] == expected
    assert seen.image_size == 8
    assert seen.windows is None

"""The side of a recipe's store follows from the views of all of its stages."""

from pathlib import Path

import pytest

from bench.photographs import make_photograph_recipe
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.tasks.pretrain import METHODS
from tests.support import recipes


@pytest.mark.parametrize(("side", "expected"), [(64, 128), (128, 256), (224, 448)])
def test_views_of_a_pretraining_decide(tmp_path: Path, side: int, expected: int) -> None:
    assert find_recipe_side(make_photograph_recipe(tmp_path, tmp_path, side)) == expected


def test_smaller_crops_of_one_view_need_more(tmp_path: Path) -> None:
    made = make_photograph_recipe(tmp_path, tmp_path, 64)
    small = [{"op": "random_resized_crop", "scale": [0.04, 1.0]}]
    stage = made.stages["pretrain"]
    views = stage.model_copy(
        update={
            "augment": type(made.dataset)
            .model_validate({**made.dataset.model_dump(), "train_augment": small}, strict=False)
            .train_augment
        }
    )
    assert find_recipe_side(made.model_copy(update={"stages": {"pretrain": views}})) == 288


def test_crops_in_pixels_need_the_images_as_they_are(tmp_path: Path) -> None:
    crop = [{"op": "random_crop", "size": 60}]
    assert find_recipe_side(make_photograph_recipe(tmp_path, tmp_path, 64, train_augment=crop)) is None


def test_small_recipe_needs_less_than_its_images_have(tmp_path: Path) -> None:
    assert find_recipe_side(recipes.recipe(tmp_path)) == 32


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("first_view", ["augmented", "plain"])
def test_section_tells_the_side_that_its_kind_tells(
    tmp_path: Path, name: str, first_view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [{"op": "random_resized_crop", "scale": [0.04, 1.0]}]
    method = {"name": name, **({"teacher": {"name": "convnet"}} if name == "distill" else {})}
    made = make_photograph_recipe(tmp_path, tmp_path, 64, train_augment=small)
    raw = made.dump()
    raw["stages"]["pretrain"] |= {"method": method, "first_view": first_view}
    recipe = parse_recipe(raw)
    found = find_recipe_side(recipe)
    monkeypatch.setattr(StageConfig, "has_plain_crops", False)
    for stage in recipe.stages.values():
        monkeypatch.setattr(type(stage), "has_plain_crops", False)
    assert find_recipe_side(recipe) == found

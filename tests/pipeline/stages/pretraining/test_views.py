"""Views of an image: from the recipe, or as the method makes them; mistakes are one line."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import preflight
from firstlight.pipeline.stages.pretraining.views import list_views
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.pretrain.method import ViewGroup
from firstlight.tasks.pretrain.super_and import SuperAnd
from tests.support import recipes

TWO_VIEWS = {"name": "super_and", "dim": 8, "rounds": 1}
CROP = [{"op": "random_crop", "scale": 0.5}]


def read_views(folder: Path, **keys: Any) -> list[tuple[list[str], int]]:
    """The names of the ops, and the size, of each view."""
    changes = {f"stages__pretrain__{key}": value for key, value in {"method": TWO_VIEWS, **keys}.items()}
    recipe = recipes.recipe(folder, **changes)
    stage: Any = recipe.stages["pretrain"]
    assert isinstance(stage, Pretrain)
    return [([op.op for op in view.augment], view.size) for view in list_views(stage, recipe.dataset)]


def test_views_are_those_of_the_data_set_unless_the_stage_says_otherwise(tmp_path: Path) -> None:
    assert read_views(tmp_path) == [(["random_shift"], 8)] * 2
    assert read_views(tmp_path, augment=CROP) == [(["random_crop"], 8)] * 2
    assert read_views(tmp_path, first_view="plain") == [(["center_crop"], 8), (["random_shift"], 8)]


def test_groups_of_views_are_listed_in_order(tmp_path: Path) -> None:
    groups = [{"count": 2, "size": 12}, {"size": 5, "augment": [{"op": "center_crop"}]}, {}]
    expected = [(["random_crop"], 12)] * 2 + [(["center_crop"], 5), (["random_crop"], 8)]
    assert read_views(tmp_path, views=groups, augment=CROP) == expected


def test_method_makes_its_views_of_the_augmentations_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def default_views(augment: Any, image_size: int, parameters: Any) -> tuple[ViewGroup, ...]:
        flipped = (*augment, {"op": "horizontal_flip"})
        return ViewGroup(1, image_size, augment), ViewGroup(1, image_size // 2, flipped)

    monkeypatch.setattr(SuperAnd, "default_views", default_views)
    assert METHODS["super_and"] is SuperAnd
    assert read_views(tmp_path) == [(["random_shift"], 8), (["random_shift", "horizontal_flip"], 4)]
    assert read_views(tmp_path, augment=CROP) == [(["random_crop"], 8), (["random_crop", "horizontal_flip"], 4)]
    assert read_views(tmp_path, views=[{"count": 2}]) == [(["random_shift"], 8)] * 2


VIT = {"name": "timm", "model": "test_vit", "img_size": 8, "patch_size": 4}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"views": [{"count": 3}]},
        "stages.pretrain.views: 3 views of an image are not valid: the method, as it is set, takes 2",
    ),
    ({"views": []}, "stages.pretrain.views: "),
    ({"views": [{"count": 2, "size": 3}]}, "stages.pretrain.views.0.size: 3"),
    ({"views": [{"count": 2, "augment": [{"op": "horizontal_flip"}]}]}, "stages.pretrain.views.0.augment"),
    ({"views": [{"count": 2, "sise": 3}]}, "stages.pretrain.views.0.sise"),
    (
        {"views": [{"count": 2}], "first_view": "plain"},
        "stages.pretrain.first_view: 'plain' is not valid with stages.pretrain.views; valid: augmented",
    ),
    (
        {"views": [{}, {"size": 4}], "encoder": {**VIT, "dynamic_img_size": False}},
        "stages.pretrain.views: a size of 4 pixels is not valid: test_vit with images of 8 pixels cannot take it; "
        "valid: 8, or encoder.dynamic_img_size: true",
    ),
]


@pytest.mark.parametrize(("keys", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_wrong_views_are_one_line(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    keys = {"method": TWO_VIEWS, **keys}
    changes = {f"stages__pretrain__{key}": value for key, value in keys.items() if key != "encoder"}
    with pytest.raises(UserError) as caught:
        preflight.check_recipe(
            recipes.recipe(tmp_path, **changes, encoder=keys.get("encoder", recipes.RECIPE["encoder"]))
        )
    assert len(str(caught.value).splitlines()) == 1
    assert message in str(caught.value)


def test_vit_with_dynamic_size_takes_views_of_other_sizes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"stages__pretrain__method": TWO_VIEWS, "stages__pretrain__views": [{}, {"size": 4}]}
    recipe = recipes.recipe(tmp_path, **changes, encoder={**VIT, "dynamic_img_size": True})
    preflight.check_recipe(recipe)
    stage: Any = recipe.stages["pretrain"]
    assert [view.size for view in list_views(stage, recipe.dataset)] == [8, 4]

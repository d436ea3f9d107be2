"""Checks that kinds of stages share name the key, the value and the valid values."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import nn

from firstlight.pipeline.config.comparison import FeatureStage
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import LabelBudget, TrainingOptions
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.checks import (
    check_batch_images,
    check_class_names,
    check_feature_layers,
    check_head_source,
    check_made_network,
    check_made_table,
    check_scored_images,
    check_target,
    check_test_split,
    count_labelled,
)
from firstlight.pipeline.stages.stage_kind import RecipeContext
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes
from tests.support.own_training import SECTION, know_own_training


def make_context(recipe: Recipe) -> RecipeContext:
    return RecipeContext(recipe, open_source(recipe.dataset), Encoder(recipe.network_spec, 8))


def refuse(message: str) -> Any:
    return pytest.raises(UserError, match="^" + re.escape(message))


def test_target_that_the_source_has_not_is_refused_with_the_tasks_that_it_has(tmp_path: Path) -> None:
    context = make_context(recipes.recipe(tmp_path))
    check_target("stages.finetune", "label", context, "classify")
    with refuse("stages.finetune.task.name: 'detect' needs boxes, and dataset.root None has label instead; valid: a "):
        check_target("stages.finetune", "boxes", context, "detect")


def test_missing_test_split_is_refused_unless_the_recipe_leaves_it_alone(tmp_path: Path) -> None:
    context = make_context(recipes.recipe(tmp_path))
    check_test_split("stages.evaluate", context)
    without = replace(context, source=cast(Any, SimpleNamespace(splits={"train": []})))
    with refuse("stages.evaluate: needs a test split; dataset.test_fraction: 0.2 leaves none"):
        check_test_split("stages.evaluate", without)
    check_test_split("stages.evaluate", replace(without, recipe=recipes.recipe(tmp_path, score_test=False)))


def test_unknown_class_is_refused_with_a_known_one() -> None:
    check_class_names("stages.embed.map_classes", ("cat",), ("cat", "dog"))
    with refuse("stages.embed.map_classes: 'cta' is no class of the data set; did you mean 'cat'?"):
        check_class_names("stages.embed.map_classes", ("cta",), ("cat", "dog"))


def test_network_and_table_that_a_stage_does_not_make_are_refused_with_its_method_or_kind(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path)
    check_made_network("stages.x.features", "head", recipe, "pretrain", {"head": nn.Identity()})
    with refuse("stages.x.arms: 'pretrained_decoder' is not valid: nat of stages.pretrain makes no decoder but head; "):
        check_made_network("stages.x.arms", "decoder", recipe, "pretrain", {"head": nn.Identity()})
    with know_own_training():
        own = make_context(recipes.recipe(tmp_path, stages={"own": SECTION}))
        with refuse("stages.x.knn_bank: true is not valid: own_training of stages.own keeps no memory bank; "):
            check_made_table("stages.x.knn_bank", "bank", own, "own")
        own.tables["own"] = frozenset({"bank"})
        check_made_table("stages.x.knn_bank", "bank", own, "own")


def test_head_of_a_stage_that_makes_none_is_refused(tmp_path: Path) -> None:
    with know_own_training():
        stages = {"own": SECTION, "evaluate": {"kind": "evaluate", "features": "head"}}
        context = make_context(recipes.recipe(tmp_path, stages=stages))
        stage = cast(FeatureStage, context.recipe.stages["evaluate"])
        with refuse("stages.evaluate.features: 'head' is not valid: own_training of stages.own makes no head; valid: "):
            check_head_source("evaluate", stage, context)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": [-1, 5]}, "stages.evaluate.layers: 5 is not one of the encoder's 2 feature maps; valid: -2 to 1"),
        ({"pool": "cls"}, "stages.evaluate.pool: 'cls' needs a class token, and convnet has none; valid: avg, grid"),
        ({"features": "head", "pool": "grid"}, "stages.evaluate.pool: grid is not valid with features: head, which "),
    ],
)
def test_layers_and_pooling_are_checked_against_the_encoder(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    recipe = recipes.recipe(tmp_path, **{f"stages__evaluate__{key}": value for key, value in keys.items()})
    encoder = Encoder(recipe.network_spec, 8)
    with refuse(message):
        check_feature_layers("stages.evaluate", "layers", cast(FeatureStage, recipe.stages["evaluate"]), encoder)
    usual = cast(FeatureStage, recipes.recipe(tmp_path).stages["evaluate"])
    check_feature_layers("stages.evaluate", "layers", usual, encoder)


def test_every_worker_has_an_image_to_score(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path)
    splits = draw_splits(digits, recipe.dataset)
    check_scored_images(recipe, splits, "label")
    many = recipe.model_copy(update={"scale": recipe.scale.model_copy(update={"workers": 50})})
    held_out = len(splits.val)
    with refuse(f"dataset.val_fraction: leaves {held_out} labelled val images for 50 workers: too few"):
        check_scored_images(many, splits, "label")


def test_images_and_labels_of_a_training_are_counted(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path)
    splits, stage = draw_splits(digits, recipe.dataset), recipe.stages["finetune"]
    assert count_labelled("stages.finetune", cast(LabelBudget, stage), splits, 0, "label") == 40
    check_batch_images("stages.finetune", cast(TrainingOptions, stage), 20)
    with refuse("stages.finetune.batch_size: 20 is more than the 19 images it would train on"):
        check_batch_images("stages.finetune", cast(TrainingOptions, stage), 19)
    wanted = recipes.recipe(tmp_path, stages__finetune__labels_per_class=500).stages["finetune"]
    with refuse("stages.finetune.labels_per_class: 500"):
        count_labelled("stages.finetune", cast(LabelBudget, wanted), splits, 0, "label")

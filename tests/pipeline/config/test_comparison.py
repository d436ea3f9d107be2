"""The arms of stages: what a recipe has completes them, and what it lacks is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from firstlight.pipeline.config.comparison import ComparisonStage, FeatureStage
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from tests.support import recipes

WEIGHTS = {"encoder__weights": "/weights.safetensors"}
EVALUATE: dict[str, Any] = {"kind": "evaluate", "knn_k": 5}


def arms_of(recipe: Recipe) -> dict[str, tuple[str, ...] | None]:
    return {name: stage.arms for name, stage in recipe.stages.items() if isinstance(stage, ComparisonStage)}


def without_pretraining(tmp_path: Path, **changes: Any) -> Recipe:
    stages = {name: dict(recipes.RECIPE["stages"][name]) for name in ("evaluate", "finetune")}
    stages["evaluate"] |= changes.pop("evaluate", {})
    return recipes.recipe(tmp_path, stages=stages, **changes)


def test_head_features_need_the_head() -> None:
    assert FeatureStage(kind="x", features="head").companions == ("head",)
    assert FeatureStage(kind="x").companions == ()


def test_arms_are_those_that_the_recipe_has(tmp_path: Path) -> None:
    plain, both = recipes.recipe(tmp_path), recipes.recipe(tmp_path, **WEIGHTS)
    assert arms_of(plain) == {"evaluate": ("pretrained", "random"), "finetune": ("pretrained", "scratch")}
    assert arms_of(both) == {
        "evaluate": ("pretrained", "given", "random"),
        "finetune": ("pretrained", "given", "scratch"),
    }
    alone = without_pretraining(tmp_path, **WEIGHTS)
    assert arms_of(alone) == {"evaluate": ("given", "random"), "finetune": ("given", "scratch")}
    for recipe in (plain, both, alone):
        assert parse_recipe(recipe.dump()) == recipe


def test_stages_take_the_weights_that_their_arms_need(tmp_path: Path) -> None:
    alone, both = without_pretraining(tmp_path, **WEIGHTS), recipes.recipe(tmp_path, **WEIGHTS)
    for name in ("evaluate", "finetune"):
        assert (alone.stages[name].takes_given, alone.stages[name].start) == (True, None)
        assert (both.stages[name].takes_given, both.stages[name].start) == (True, "previous")
    fresh = recipes.recipe(tmp_path, stages__evaluate__arms=["random"], stages__finetune__arms=["he", "scratch"])
    assert not fresh.takes_given
    assert fresh.encoder_source("evaluate") is fresh.encoder_source("finetune") is None


def test_an_encoder_that_is_the_given_one_is_no_arm_of_its_own(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, stages__evaluate__encoder="given", **WEIGHTS)
    assert arms_of(recipe)["evaluate"] == ("given", "random")
    pinned = without_pretraining(tmp_path, evaluate={"encoder": "models:/x@current"}, **WEIGHTS)
    assert arms_of(pinned)["evaluate"] == ("pretrained", "given", "random")


def test_named_arms_of_features_are_in_the_order_of_the_tables(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, stages__evaluate__arms=["random", "given", "pretrained"], **WEIGHTS)
    assert arms_of(recipe)["evaluate"] == ("pretrained", "given", "random")
    ordered = recipes.recipe(tmp_path, stages__finetune__arms=["scratch", "given"], **WEIGHTS)
    assert arms_of(ordered)["finetune"] == ("scratch", "given"), "the last one is the baseline"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages__evaluate__arms": ["pretrained", "given"]},
            "stages.evaluate.arms: 'given' is not valid: the recipe names no weights (encoder.weights); valid: "
            "pretrained, random",
        ),
        (
            {"stages__finetune__arms": ["given", "scratch"]},
            "stages.finetune.arms: 'given' is not valid: the recipe names no weights (encoder.weights); valid: "
            "pretrained, pretrained_decoder, scratch, gaussian, he, xavier, lsuv",
        ),
        (
            {"stages__evaluate__arms": ["given"], "stages__evaluate__features": "head", **WEIGHTS},
            "stages.evaluate.features: 'head' is not valid without the arm pretrained, whose pretraining makes the "
            "head; valid: encoder",
        ),
        (
            {"stages__evaluate__arms": ["pretrained", "given"], "stages__evaluate__features": "head", **WEIGHTS},
            "stages.evaluate.arms: 'given' is not valid with features: head: the weights come without a head, and a "
            "fresh one would be measured; valid: pretrained, random, or features: encoder",
        ),
        (
            {"stages__evaluate__arms": ["random", "random"]},
            'stages.evaluate.arms: ["random", "random"] is not valid: must not repeat an arm',
        ),
    ],
)
def test_an_arm_that_the_recipe_cannot_have_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        recipes.recipe(tmp_path, **changes)
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


def test_pretrained_arm_without_a_pretraining_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^stages\.evaluate\.arms: 'pretrained' is not valid: .*; valid: given, random"
    ):
        without_pretraining(tmp_path, evaluate={"arms": ["pretrained", "given"]}, **WEIGHTS)
    with pytest.raises(UserError, match=r"^stages\.evaluate\.encoder: 'previous' needs a pretrain stage before it"):
        without_pretraining(tmp_path)


def test_features_of_the_head_leave_the_given_weights_out(tmp_path: Path) -> None:
    """They are those of an encoder, without a head."""
    recipe = recipes.recipe(tmp_path, stages__evaluate__features="head", **WEIGHTS)
    assert arms_of(recipe)["evaluate"] == ("pretrained", "random")
    with pytest.raises(UserError, match=r"^stages\.evaluate\.features: 'head' is not valid without the arm pretrained"):
        without_pretraining(tmp_path, evaluate={"features": "head"}, **WEIGHTS)


def test_unknown_or_no_arm_is_rejected() -> None:
    for arms in ((), ("scratch",)):
        with pytest.raises(ValidationError):
            FeatureStage(kind="x", arms=arms)  # type: ignore[arg-type]

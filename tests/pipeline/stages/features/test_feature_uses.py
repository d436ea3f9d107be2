"""The recipe says which stages take the same frozen features, before any of them is computed."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.config.recipe import EncoderSource, Recipe
from firstlight.pipeline.stages.features.feature_uses import (
    FeatureUse,
    list_feature_uses,
    list_later_uses,
    takes_kept_embeddings,
)
from tests.support import recipes

EMBED = {"kind": "embed", "batch_size": 32}
RETRIEVE = {"kind": "retrieve", "batch_size": 32, "precision_at": [1]}
TRAINED = EncoderSource(stage="pretrain")


def make_recipe(**changes: Any) -> Recipe:
    return recipes.recipe(Path("nowhere"), stages__retrieve=dict(RETRIEVE), stages__embed=dict(EMBED), **changes)


def test_arms_and_layers_of_a_stage_are_listed() -> None:
    uses = list_feature_uses(make_recipe(stages__evaluate__layers=[0, -1], stages__evaluate__pool="grid"), "evaluate")
    assert uses == {
        "pretrained": [FeatureUse(TRAINED, False, "grid", layer, 32, "fp32") for layer in (0, -1)],
        "random": [FeatureUse("random", False, "grid", layer, 32, "fp32") for layer in (0, -1)],
    }
    assert list_feature_uses(make_recipe(), "pretrain") == {}
    assert list_feature_uses(make_recipe(), "embed") == {"pretrained": [trained_average()]}


def trained_average() -> FeatureUse:
    """The mean of the deepest map of the trained encoder, which evaluation, retrieval and embeddings take."""
    return FeatureUse(TRAINED, False, "avg", -1, 32, "fp32")


def test_later_stages_want_what_they_take_until_the_last_has_it() -> None:
    recipe, random = make_recipe(), FeatureUse("random", False, "avg", -1, 32, "fp32")
    assert list_later_uses(recipe, "evaluate", 0) == {trained_average(), random}
    assert list_later_uses(recipe, "retrieve", 0) == {trained_average()}
    assert list_later_uses(recipe, "embed", 0) == frozenset()


@pytest.mark.parametrize(
    "change",
    [
        {"stages__retrieve__layer": 0},
        {"stages__retrieve__batch_size": 16},
        {"stages__retrieve__pool": "grid"},
        {"stages__retrieve__precision": "bf16"},
    ],
)
def test_other_layers_poolings_batches_and_number_formats_are_other_features(change: dict[str, Any]) -> None:
    recipe = make_recipe(**change)
    (own,) = list_feature_uses(recipe, "evaluate")["random"]
    assert own not in list_later_uses(recipe, "evaluate", 0)


def test_a_head_is_one_output_of_its_own() -> None:
    uses = list_feature_uses(make_recipe(stages__evaluate__features="head"), "evaluate")
    assert uses["pretrained"] == [FeatureUse(TRAINED, True, "head", -1, 32, "fp32")]


def test_later_seeds_take_weights_that_are_the_same_for_all_seeds() -> None:
    weights = {"encoder__weights": "w.safetensors", "encoder__mean": [0.1] * 3, "encoder__std": [0.2] * 3}
    recipe = make_recipe(seeds=[0, 1], **weights)
    given = FeatureUse("given", False, "avg", -1, 32, "fp32")
    last = list_later_uses(recipe, "retrieve", 1)
    assert given in list_later_uses(recipe, "retrieve", 0)
    assert given not in last
    assert FeatureUse("random", False, "avg", -1, 32, "fp32") not in list_later_uses(recipe, "retrieve", 0)
    fixed = make_recipe(seeds=[0, 1], stages__embed__encoder="models:/other/1")
    (use,) = list_feature_uses(fixed, "embed")["pretrained"]
    assert use.is_of_every_seed
    assert list_later_uses(fixed, "embed", 0) == {use}


def test_an_encoder_that_is_the_given_one_has_the_weights_of_that_arm() -> None:
    weights = {"encoder__weights": "w.safetensors", "encoder__mean": [0.1] * 3, "encoder__std": [0.2] * 3}
    recipe = make_recipe(stages__embed__encoder="given", **weights)
    assert list_feature_uses(recipe, "embed")["pretrained"] == list_feature_uses(recipe, "evaluate")["given"]


@pytest.mark.parametrize(
    ("scale", "takes"),
    [
        ({"workers": 0}, True),
        ({"workers": 1}, True),
        ({"workers": 2}, False),
        ({"workers": 1, "address": "auto"}, False),
        ({"workers": 1, "gpus_per_worker": 1.0}, False),
    ],
)
def test_embeddings_of_other_processes_are_their_own(scale: dict[str, Any], takes: bool) -> None:
    recipe = make_recipe(**{f"scale__{key}": value for key, value in scale.items()})
    assert takes_kept_embeddings(recipe.scale) == takes
    assert bool(list_feature_uses(recipe, "embed")) == takes

"""Sections whose keys are the parameters of registered functions."""

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.schema import (
    Augment,
    MethodSpec,
    _tagged_union,
    build_ten_crops,
    check_augment,
    check_distinct,
    constructor_arguments,
)
from tests.support.paths import ROOT

QUICKSTART = ROOT / "conf/recipe/quickstart.yaml"


def test_section_is_frozen() -> None:
    recipe = load_recipe(QUICKSTART)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.scale.workers = 5  # type: ignore[misc]


def shrink(image: object, *, factor: Annotated[int, Ge(1)] = 2, mode: Literal["a", "b"]) -> None:
    """Makes it smaller.

    `factor`: how much smaller.
    `mode`: the way.
    """


def test_parameters_become_keys_with_types_defaults_and_meanings() -> None:
    model = _tagged_union({"shrink": shrink}, "name")
    assert list(model.model_fields) == ["name", "factor", "mode"]
    assert model.model_fields["factor"].description == "How much smaller."
    assert model.model_validate({"name": "shrink", "mode": "a"}).factor == 2
    for wrong in (
        {"mode": "c"},
        {},
        {"mode": "a", "factor": 0},
        {"mode": "a", "image": 1},
        {"mode": "a", "factor": 1.5},
    ):
        with pytest.raises(ValidationError):
            model.model_validate({"name": "shrink", **wrong})


def test_name_picks_the_parameters() -> None:
    spec: Any = TypeAdapter(MethodSpec).validate_python({"name": "nat", "dim": 8})
    assert constructor_arguments(spec)["dim"] == 8
    assert "name" not in constructor_arguments(spec)
    with pytest.raises(ValidationError, match="level"):
        TypeAdapter(MethodSpec).validate_python({"name": "nat", "level": "pixel"})


@pytest.mark.parametrize(
    ("ops", "found"),
    [
        ([{"op": "horizontal_flip"}], "found none"),
        ([{"op": "center_crop"}, {"op": "fit"}], "found"),
        ([{"op": "horizontal_flip"}, {"op": "center_crop"}], "found"),
    ],
)
def test_augmentations_start_with_exactly_one_crop(ops: list[dict[str, str]], found: str) -> None:
    parsed: Any = TypeAdapter(Augment).validate_python(tuple(ops))
    with pytest.raises(ValueError, match=f"exactly one of .*{found}"):
        check_augment(parsed)


def test_ten_crops_are_valid_augmentations() -> None:
    crops = build_ten_crops(0.5)
    assert len(crops) == 10
    assert all(check_augment(crop) == crop and crop[0].scale == 0.5 for crop in crops)


def test_repeated_value_is_named_by_what_it_is() -> None:
    assert check_distinct((1, 2), "a seed") == (1, 2)
    with pytest.raises(ValueError, match="must not repeat a seed"):
        check_distinct((1, 1), "a seed")

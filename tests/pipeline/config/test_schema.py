"""Sections whose keys are the parameters of registered functions."""

from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.schema import (
    Augment,
    MethodSpec,
    _tagged_union,
    build_ten_crops,
    build_windows,
    check_augment,
    check_distinct,
    constructor_arguments,
)
from firstlight.pipeline.errors import UserError
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


@pytest.mark.parametrize("op", ["center_crop", "random_crop", "corner_crop", "window_crop"])
def test_side_of_a_crop_is_given_in_one_way(op: str) -> None:
    corner = {"corner": "center"} if op == "corner_crop" else {}
    for side in ({}, {"scale": 0.5}, {"size": 89}):
        parsed: Any = TypeAdapter(Augment).validate_python(({"op": op, **corner, **side},))
        assert check_augment(parsed) == parsed
        again: Any = TypeAdapter(Augment).validate_json(TypeAdapter(Augment).dump_json(parsed))
        assert check_augment(again) == parsed, "also after a round trip through JSON"
    both: Any = TypeAdapter(Augment).validate_python(({"op": op, **corner, "scale": 0.5, "size": 89},))
    with pytest.raises(ValueError, match=rf"^{op} has scale: 0.5 and size: 89; valid: one of them$"):
        check_augment(both)


def test_two_sides_of_a_crop_are_refused_by_their_key() -> None:
    crop = "dataset.eval_augment=[{op: center_crop, scale: 0.5, size: 8}]"
    with pytest.raises(
        UserError, match=r"^dataset\.eval_augment: .*center_crop has scale: 0.5 and size: 8; valid: one"
    ):
        load_recipe(QUICKSTART, (crop,))


@pytest.mark.parametrize(("scale", "size"), [(0.5, None), (None, 89), (None, None)])
def test_ten_crops_are_valid_augmentations(scale: float | None, size: int | None) -> None:
    crops = build_ten_crops(scale, size)
    assert len(crops) == 10
    assert all(check_augment(crop) == crop for crop in crops)
    assert {(crop[0].scale, crop[0].size) for crop in crops} == {(scale, size)}


def test_windows_are_valid_augmentations() -> None:
    windows = build_windows(np.array([[100, 50]]), 1.0, None)
    assert len(windows) == 2
    assert all(check_augment(window) == window for window in windows)


def test_repeated_value_is_named_by_what_it_is() -> None:
    assert check_distinct((1, 2), "a seed") == (1, 2)
    with pytest.raises(ValueError, match="must not repeat a seed"):
        check_distinct((1, 1), "a seed")

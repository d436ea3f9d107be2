"""Sections whose keys are the parameters of registered functions."""

from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.schema import (
    WEIGHT_KEYS,
    Augment,
    MethodSpec,
    _tagged_union,
    build_ten_crops,
    build_windows,
    check_augment,
    check_distinct,
    constructor_arguments,
)
from firstlight.pipeline.config.schemas.entries import describe_registry
from firstlight.pipeline.errors import UserError
from firstlight.tasks.nn.encoders import WEIGHT_SECTION_KEYS
from tests.support.paths import ROOT

DIGITS = ROOT / "conf/recipe/digits.yaml"


def test_section_is_frozen() -> None:
    recipe = load_recipe(DIGITS)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.scale.workers = 5  # type: ignore[misc]


def shrink(image: object, *, factor: Annotated[int, Ge(1)] = 2, mode: Literal["a", "b"]) -> None:
    """Makes it smaller.

    `factor`: how much smaller.
    `mode`: the way.
    """


def test_parameters_become_keys_with_types_defaults_and_meanings() -> None:
    model = _tagged_union(describe_registry({"shrink": shrink}, {}), "name")
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


def test_parameter_that_every_entry_has_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^name: shrink has the parameter factor, which every entry has: it needs"):
        _tagged_union(describe_registry({"shrink": shrink}, {}), "name", factor=(int, 3))


def test_name_picks_the_parameters() -> None:
    spec: Any = TypeAdapter(MethodSpec).validate_python({"name": "nat", "dim": 8})
    assert constructor_arguments(spec)["dim"] == 8
    assert "name" not in constructor_arguments(spec)
    with pytest.raises(ValidationError, match="level"):
        TypeAdapter(MethodSpec).validate_python({"name": "nat", "level": "pixel"})


def test_network_of_a_method_has_the_keys_of_the_section_encoder() -> None:
    section = {"name": "convnet", "width": 5, "weights": "teacher.safetensors"}
    spec: Any = TypeAdapter(MethodSpec).validate_python({"name": "distill", "teacher": section})
    taken = constructor_arguments(spec)["teacher"]
    assert (taken["width"], taken["weights"], taken["input"]) == (5, "teacher.safetensors", "rgb")
    assert WEIGHT_KEYS == WEIGHT_SECTION_KEYS
    with pytest.raises(ValidationError, match=r"teacher\.convnet\.wide"):
        TypeAdapter(MethodSpec).validate_python({"name": "distill", "teacher": {**section, "wide": 5}})


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


@pytest.mark.parametrize(
    ("op", "complaint"),
    [
        ("{op: cutout, scale: 0.5, size: 8}", "cutout has scale: 0.5 and size: 8; valid: one of them"),
        (
            "{op: rand_augment, magnitude: 10, num_magnitude_bins: 10}",
            "rand_augment has magnitude: 10 and num_magnitude_bins: 10; valid: a magnitude of 0 to 9",
        ),
        ("{op: rand_augment, num_magnitude_bins: 5}", "rand_augment has magnitude: 9 and num_magnitude_bins: 5; valid"),
    ],
)
def test_parameters_that_exclude_each_other_are_refused(op: str, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.train_augment: .*{complaint}"):
        load_recipe(DIGITS, (f"dataset.train_augment=[{{op: random_shift}}, {op}]",))


def test_magnitude_that_is_not_used_is_not_compared() -> None:
    op = "{op: rand_augment, magnitudes: random, num_magnitude_bins: 5}"
    recipe = load_recipe(DIGITS, (f"dataset.train_augment=[{{op: random_shift}}, {op}]",))
    assert recipe.dataset.train_augment[1].num_magnitude_bins == 5


@pytest.mark.parametrize(
    ("op", "key", "complaint"),
    [
        ("gaussian_blur, p: 1.1", "p", "1.1 is not valid: must be less than or equal to 1"),
        ("gaussian_blur, sigma: [0.0, 2.0]", "sigma.0", "0.0 is not valid: must be greater than or equal to 0.01"),
        ("gaussian_blur, kernel_size: 2", "kernel_size", "2 is not valid: must be greater than or equal to 3"),
        ("solarize, threshold: 256", "threshold", "256 is not valid: must be less than or equal to 255"),
        ("posterize", "bits", "is missing and has no default"),
        ("posterize, bits: 0", "bits", "0 is not valid: must be greater than or equal to 1"),
        ("sharpness, sharpness_factor: -1.0", "sharpness_factor", "-1.0 is not valid: must be greater"),
        ("color_jitter, p: -0.1", "p", "-0.1 is not valid: must be greater than or equal to 0"),
        ("random_erasing, value: white", "value", "\"white\" is not valid: must be 'black', 'gray' or 'noise'"),
        ("random_erasing, scale: [0.0, 0.3]", "scale.0", "0.0 is not valid: must be greater than 0"),
        ("cutout, size: 0.5", "size", "0.5 is not valid: must be a valid integer"),
        ("cutout, scale: 1.5", "scale", "1.5 is not valid: must be less than or equal to 1"),
        ("rand_augment, num_ops: 17", "num_ops", "17 is not valid: must be less than or equal to 16"),
        ("rand_augment, pool: imagenet", "pool", "\"imagenet\" is not valid: must be 'torchvision' or 'fixmatch'"),
        ("trivial_augment, num_magnitude_bins: 1", "num_magnitude_bins", "1 is not valid: must be greater"),
    ],
)
def test_wrong_parameters_of_an_op_are_named_by_their_key(op: str, key: str, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.train_augment\.1\.{key}: {complaint}[^\n]*$"):
        load_recipe(DIGITS, (f"dataset.train_augment=[{{op: random_shift}}, {{op: {op}}}]",))


def test_two_sides_of_a_crop_are_refused_by_their_key() -> None:
    crop = "dataset.eval_augment=[{op: center_crop, scale: 0.5, size: 8}]"
    with pytest.raises(
        UserError, match=r"^dataset\.eval_augment: .*center_crop has scale: 0.5 and size: 8; valid: one"
    ):
        load_recipe(DIGITS, (crop,))


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


def test_repeated_value_is_named_by_its_kind() -> None:
    assert check_distinct((1, 2), "a seed") == (1, 2)
    with pytest.raises(ValueError, match="must not repeat a seed"):
        check_distinct((1, 1), "a seed")

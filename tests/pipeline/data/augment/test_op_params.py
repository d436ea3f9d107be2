"""The parameters of each op, applied to small images with known pixels."""

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.augment.op_params import (
    NO_OP,
    POLICY_KINDS,
    POLICY_STEP_WIDTH,
    Affine,
    CropBox,
    Fit,
    Flip,
    Grayscale,
    Jitter,
    OpBatch,
    OpParams,
    Policy,
    Shift,
    VerticalFlip,
)
from firstlight.pipeline.data.augment.pixel_params import Posterize, Solarize

PIXELS = np.random.default_rng(0).integers(1, 256, (6, 6, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def apply(params: OpParams, size: int = 6) -> np.ndarray:
    return np.asarray(params.apply_to(IMAGE, size))


def test_box_of_the_result_size_copies_pixels() -> None:
    assert np.array_equal(apply(CropBox(1, 2, 4, 4), 4), PIXELS[2:6, 1:5])


def test_box_beyond_the_edge_by_rounding_is_accepted() -> None:
    assert np.array_equal(apply(CropBox(-1e-13, 0, 6 + 2e-13, 6)), PIXELS)


def test_shift_moves_right_and_down_and_fills_with_black() -> None:
    found = apply(Shift(0, 0, 6, 2, -1))
    assert np.array_equal(found[:5, 2:], PIXELS[1:, :4])
    assert not found[:, :2].any()
    assert not found[5].any()


def test_fit_places_the_whole_image_on_black() -> None:
    found = apply(Fit(6, 6, 1, 2, 6, 6), 9)
    assert np.array_equal(found[2:8, 1:7], PIXELS)
    assert found.sum() == PIXELS.sum()


@pytest.mark.parametrize(("flipped", "expected"), [(1.0, PIXELS[:, ::-1]), (0.0, PIXELS)])
def test_flip_mirrors_left_to_right(flipped: float, expected: np.ndarray) -> None:
    assert np.array_equal(apply(Flip(flipped)), expected)


@pytest.mark.parametrize(("flipped", "expected"), [(1.0, PIXELS[::-1]), (0.0, PIXELS)])
def test_vertical_flip_mirrors_top_to_bottom(flipped: float, expected: np.ndarray) -> None:
    assert np.array_equal(apply(VerticalFlip(flipped)), expected)


def build_numbers(*steps: OpParams | None) -> list[float]:
    """Returns the numbers of a policy; None: no op."""
    numbers: list[float] = []
    for step in steps:
        own: list[float] = [NO_OP]
        if step is not None:
            own = [POLICY_KINDS.index(type(step)), *step]  # type: ignore[arg-type, misc, list-item]
        numbers += [*own, *[0.0] * (POLICY_STEP_WIDTH - len(own))]
    return numbers


def test_policy_applies_its_ops_in_order_and_skips_those_not_chosen() -> None:
    steps = (Solarize(100), Affine(1, 0, 2, 0, 1, 0), Posterize(3))
    policy = Policy(*build_numbers(None, steps[0], None, *steps[1:]))
    assert policy.steps == steps
    expected = IMAGE
    for step in steps:
        expected = step.apply_to(expected, 6)
    assert np.array_equal(apply(policy), np.asarray(expected))
    assert np.array_equal(apply(Policy(*build_numbers(None))), PIXELS)
    assert not np.array_equal(apply(Policy(*build_numbers(*steps[::-1]))), apply(policy))


def test_affine_maps_output_to_input_pixels() -> None:
    found = apply(Affine(1, 0, 2, 0, 1, 0))
    assert np.array_equal(found[:, :4], PIXELS[:, 2:])
    assert not found[:, 4:].any()


def test_neutral_jitter_is_the_image_and_order_matters() -> None:
    assert np.array_equal(apply(Jitter(1, 1, 1, 0, 0, 1, 2, 3)), PIXELS)
    assert not np.array_equal(apply(Jitter(1.5, 0.5, 1, 0, 0, 1, 2, 3)), apply(Jitter(1.5, 0.5, 1, 0, 1, 0, 2, 3)))


def test_grayscale_has_three_equal_channels() -> None:
    found = apply(Grayscale(1.0))
    assert (found == found[..., :1]).all()
    assert np.array_equal(apply(Grayscale(0.0)), PIXELS)


def test_batch_gives_the_parameters_of_each_image() -> None:
    batch = OpBatch(CropBox, np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]))
    assert batch.params_per_image() == [CropBox(0, 1, 2, 3), CropBox(4, 5, 6, 7)]

"""Compiled ops are compared with Pillow before they are used: a difference of one level of one pixel is found."""

import numpy as np
import pytest

from firstlight.pipeline.data.augment.compiled.agreement import find_difference
from firstlight.pipeline.data.augment.compiled.steps import CROP_BOX_STEP, STEP_KINDS
from tests.support.compiled_views import compile_views


def test_compiled_ops_have_pillows_pixels() -> None:
    assert find_difference(compile_views()) == ""


@pytest.mark.parametrize("number", range(len(STEP_KINDS)), ids=[kind.__name__ for kind in STEP_KINDS])
def test_one_level_of_any_op_is_found(number: int) -> None:
    right = compile_views()

    def make_wrong(pixels: np.ndarray, numbers: np.ndarray, weights: np.ndarray, views: np.ndarray) -> None:
        right(pixels, numbers, weights, views)
        views[0, 3, 5, 1] ^= int(numbers[0, -1, 0] == number)

    assert find_difference(make_wrong).startswith(f"{STEP_KINDS[number].__name__} of ")


def test_another_order_of_passes_is_found() -> None:
    """Versions of Pillow have other orders. The views of the turned image have columns where the others have rows."""
    right = compile_views()

    def make_wrong(pixels: np.ndarray, numbers: np.ndarray, weights: np.ndarray, views: np.ndarray) -> None:
        right(pixels, numbers, weights, views)
        if pixels.shape[1] == 48 and numbers[0, 0, 0] == CROP_BOX_STEP:
            turned = np.ascontiguousarray(pixels.transpose(0, 2, 1, 3))
            swapped = numbers.copy()
            swapped[:, 0, 1:5] = numbers[:, 0, [2, 1, 4, 3]]
            right(turned, swapped, weights, views)
            views[:] = views.transpose(0, 2, 1, 3).copy()

    assert find_difference(make_wrong) == "CropBox of 64 x 48 pixels"

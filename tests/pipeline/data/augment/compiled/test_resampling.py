"""Boxes are resampled as by Pillow: weights, rounding, the order of the passes, and the edges."""

import numpy as np
import pytest

from firstlight.pipeline.data.augment.compiled.resampling import is_columns_first
from firstlight.pipeline.data.augment.op_params import CropBox
from tests.support.compiled_views import draw_batch, make_by_pillow, make_compiled
from tests.support.noise_images import make_extremes, make_noise


def assert_same_crops(pixels: np.ndarray, box: CropBox, size: int) -> None:
    ops = draw_batch(box, count=len(pixels))
    assert np.array_equal(make_compiled(pixels, ops, size), make_by_pillow(pixels, ops, size)), (box, size)


def test_any_box_of_any_image() -> None:
    rng = np.random.default_rng(0)
    for width, height, size in rng.integers(1, 120, (150, 3)).tolist():
        left, top, right, bottom = rng.random(4) * (width, height, width, height)
        box = CropBox(min(left, right), min(top, bottom), abs(right - left) + 0.1, abs(bottom - top) + 0.1)
        assert_same_crops(make_noise(2, width, height), box, size)


def test_whole_photograph_of_many_pixels() -> None:
    assert_same_crops(make_noise(1, 1500, 1100), CropBox(0.0, 0.0, 1500.0, 1100.0), 224)
    assert_same_crops(make_noise(1, 900, 1600), CropBox(17.5, 3.0, 800.0, 1500.0), 96)


@pytest.mark.parametrize("height", [400, 5000, 20_000])
def test_strong_shrinking_of_white_and_nearly_white_images(height: int) -> None:
    """They have the largest sums of levels times weights."""
    pixels = 255 - make_noise(3, 9, height) // 100
    assert_same_crops(pixels, CropBox(0.0, 0.0, 9.0, height), 2)
    assert_same_crops(pixels.transpose(0, 2, 1, 3), CropBox(0.0, 0.0, height, 9.0), 2)


def test_extremes_are_kept() -> None:
    for side in (7, 64):
        assert_same_crops(make_extremes(side), CropBox(0.0, 0.0, side, side), 33)


def test_a_box_on_whole_pixels_is_copied() -> None:
    pixels = make_noise(4, 40, 30)
    found = make_compiled(pixels, draw_batch(CropBox(7.0, 3.0, 16.0, 16.0), count=4), 16)
    assert np.array_equal(found, pixels[:, 3:19, 7:23])


def test_a_box_beyond_the_edge_by_rounding_is_cut_off() -> None:
    assert_same_crops(make_noise(2, 40, 30), CropBox(-1e-13, 0.0, 40.0 + 1e-12, 30.0 + 1e-13), 17)


def test_rule_of_the_order_is_that_of_pillow() -> None:
    """The height shrinks by more than twice as many pixels as the width."""
    rule = is_columns_first.py_func  # type: ignore[attr-defined]
    assert rule(100, 400, 32, 32)
    assert not rule(256, 341, 32, 32)
    assert rule(256, 341, 224, 224)
    assert not rule(32, 64, 224, 224)

"""Blur and sharpness have the pixels of the ops that Pillow and numpy compute."""

import numpy as np
import pytest

from firstlight.pipeline.data.augment.op_params import CropBox
from firstlight.pipeline.data.augment.pixel_params import Blur, Sharpness
from tests.support.compiled_views import draw_batch, make_by_pillow, make_compiled
from tests.support.noise_images import make_extremes


@pytest.mark.parametrize("side", [1, 2, 3, 9, 40])
@pytest.mark.parametrize(("sigma", "radius"), [(0.01, 1), (0.8, 1), (2.0, 11), (100.0, 31), (0.3, 4)])
def test_blur(side: int, sigma: float, radius: int) -> None:
    """A view may be smaller than the reach of the blur."""
    ops = draw_batch(CropBox(0.0, 0.0, side, side), Blur(sigma, radius), count=11)
    images = make_extremes(side)
    assert np.array_equal(make_compiled(images, ops, side), make_by_pillow(images, ops, side))


@pytest.mark.parametrize("side", [1, 2, 3, 24])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 2.0, 10.0])
def test_sharpness(side: int, factor: float) -> None:
    ops = draw_batch(CropBox(0.0, 0.0, side, side), Sharpness(factor), count=11)
    images = make_extremes(side)
    assert np.array_equal(make_compiled(images, ops, side), make_by_pillow(images, ops, side))

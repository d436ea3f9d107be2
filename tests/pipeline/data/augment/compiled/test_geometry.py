"""Flips, shifts, affine maps and erased boxes have the pixels of Pillow, and noise that of `random_numbers`."""

import numpy as np
import pytest

from firstlight.pipeline.data.augment.op_params import Affine, CropBox, Fit, Flip, OpParams, Shift, VerticalFlip
from firstlight.pipeline.data.augment.pixel_params import NOISE, Erase
from tests.support.compiled_views import draw_batch, make_by_pillow, make_compiled
from tests.support.noise_images import make_noise

SIDE = 17
CHANGES: list[OpParams] = [
    Flip(1.0),
    Flip(0.0),
    VerticalFlip(1.0),
    VerticalFlip(0.0),
    Affine(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    Affine(0.5, 0.7, -3.3, -0.7, 0.5, 8.1),
    Affine(1.0, 0.0, 5.0, 0.0, 1.0, -4.0),
    Affine(-1.0, 0.0, SIDE, 0.0, -1.0, SIDE),
    Affine(4.0, 0.1, 100.0, 0.2, 3.0, -90.0),
    Erase(3.0, 2.0, 9.0, 17.0, 127.0, 0.0),
    Erase(0.0, 0.0, 17.0, 17.0, NOISE, 2.0**53 - 1),
    Erase(5.0, 6.0, 7.0, 8.0, NOISE, 0.0),
    Erase(5.0, 5.0, 5.0, 5.0, 0.0, 0.0),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_changes_of_a_view(change: OpParams) -> None:
    images, ops = make_noise(5, SIDE, SIDE), draw_batch(CropBox(0.0, 0.0, SIDE, SIDE), change, count=5)
    assert np.array_equal(make_compiled(images, ops, SIDE), make_by_pillow(images, ops, SIDE))


@pytest.mark.parametrize("offset", [(0.0, 0.0), (4.0, -4.0), (-16.0, 16.0), (17.0, 0.0), (-40.0, 3.0)])
def test_shifts(offset: tuple[float, float]) -> None:
    images, ops = make_noise(5, 30, 22), draw_batch(Shift(4.0, 0.0, 22.0, *offset), count=5)
    assert np.array_equal(make_compiled(images, ops, SIDE), make_by_pillow(images, ops, SIDE))


@pytest.mark.parametrize(("width", "height"), [(30, 22), (5, 90), (400, 1), (17, 17)])
def test_whole_images_fit_into_the_middle(width: int, height: int) -> None:
    across, down = (max(1, round(side * SIDE / max(width, height))) for side in (width, height))
    fit = Fit(width, height, (SIDE - across) // 2, (SIDE - down) // 2, across, down)
    images, ops = make_noise(5, width, height), draw_batch(fit, count=5)
    assert np.array_equal(make_compiled(images, ops, SIDE), make_by_pillow(images, ops, SIDE))

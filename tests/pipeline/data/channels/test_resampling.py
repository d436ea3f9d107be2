"""Resampling of levels of 16 bits: exact, near Pillow's in float, and as Pillow's for 8 bits."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.channels.resampling import WEIGHT_SUM, find_taps, resample_box
from tests.support.channel_images import draw_bands

BOXES = [(0.0, 0.0, 48.0, 48.0), (3.25, 1.5, 30.1, 21.7), (10.0, 12.0, 9.5, 9.5)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("side", [16, 33, 60])
def test_levels_of_16_bits_are_those_of_pillow_in_float(box: tuple[float, ...], side: int) -> None:
    values = draw_bands(0, 4, 48)
    left, top, across, down = box
    found = resample_box(values, (left, top, across, down), side, side, 65535)
    for band in range(4):
        image = Image.fromarray(values[:, :, band].astype(np.float32))
        theirs = np.asarray(
            image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + across, top + down))
        )
        # Each of the two passes rounds, and the weights are rounded to 2**-22.
        assert np.abs(found[:, :, band] - theirs.astype(np.float64)).max() <= 1.1
    assert len(np.unique(found & 255)) > 100


def test_levels_of_8_bits_are_those_of_pillow() -> None:
    values = draw_bands(0, 3, 48, bits=8)
    for left, top, across, down in BOXES:
        found = resample_box(values, (left, top, across, down), 20, 20, 255)
        theirs = Image.fromarray(values).resize(
            (20, 20), Image.Resampling.BILINEAR, box=(left, top, left + across, top + down)
        )
        # Pillow may resample columns before rows.
        assert np.abs(found.astype(int) - np.asarray(theirs)).max() <= 1


def test_a_box_of_the_size_of_the_result_is_copied() -> None:
    values = draw_bands(0, 13, 32)
    assert np.array_equal(resample_box(values, (4.0, 6.0, 16.0, 16.0), 16, 16, 65535), values[6:22, 4:20])
    taps = find_taps(np.array([4.0]), np.array([20.0]), 32, 16)
    assert np.array_equal((taps.weights == WEIGHT_SUM).sum(2), np.ones((1, 16)))


def test_sums_of_levels_and_weights_are_exact() -> None:
    taps = find_taps(np.array([0.3, 5.0]), np.array([47.9, 9.0]), 48, 13)
    levels = draw_bands(0, 1, 48)[0, :, 0]
    for positions, weights in zip(taps.positions[0], taps.weights[0], strict=True):
        exact = sum(Fraction(int(levels[p])) * Fraction(w) for p, w in zip(positions, weights.tolist(), strict=True))
        assert Fraction(float((levels[positions] * weights).sum())) == exact
    assert np.abs(taps.weights.sum(2) - WEIGHT_SUM).max() <= taps.weights.shape[2]


def test_white_stays_white() -> None:
    white = np.full((31, 31, 2), 65535, np.uint16)
    assert (resample_box(white, (0.2, 0.7, 29.3, 28.1), 17, 17, 65535) == 65535).all()

"""Changes of colour are those of Pillow: the change of hue and of saturation for every colour there is."""

import numpy as np
import pytest

from firstlight.pipeline.data.augment.op_params import CropBox, Grayscale, Jitter, OpParams
from firstlight.pipeline.data.augment.pixel_params import SATURATED_DROPS
from tests.support.compiled_views import draw_batch, make_by_pillow, make_compiled
from tests.support.noise_images import make_extremes

SIDE = 4096
WHOLE = CropBox(0.0, 0.0, SIDE, SIDE)
ORDER = (0.0, 1.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def every_colour() -> np.ndarray:
    """(1, 4096, 4096, 3) uint8."""
    number = np.arange(SIDE * SIDE, dtype=np.uint32).reshape(1, SIDE, SIDE)
    return np.stack((number & 255, (number >> 8) & 255, number >> 16), 3).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [Jitter(1.0, 1.0, 1.0, 0.13, *ORDER), Jitter(1.0, 1.0, 1.63, 0.0, *ORDER), Grayscale(1.0)],
    ids=["hue", "saturation", "gray"],
)
def test_every_colour(every_colour: np.ndarray, change: OpParams) -> None:
    ops = draw_batch(WHOLE, change)
    assert np.array_equal(make_compiled(every_colour, ops, SIDE), make_by_pillow(every_colour, ops, SIDE))


@pytest.mark.parametrize("factor", [0.0, 1e-9, 0.2, 0.999, 1.001, 1.8, 90.0])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_factor(place: int, factor: float) -> None:
    factors = [1.0, 1.0, 1.0]
    factors[place] = factor
    ops = draw_batch(CropBox(0.0, 0.0, 33.0, 33.0), Jitter(*factors, 0.0, *ORDER), count=11)
    assert np.array_equal(make_compiled(make_extremes(33), ops, 33), make_by_pillow(make_extremes(33), ops, 33))


def test_every_turn_of_the_hue() -> None:
    for turns in np.linspace(-0.5, 0.5, 41).tolist():
        ops = draw_batch(CropBox(0.0, 0.0, 16.0, 16.0), Jitter(1.0, 1.0, 1.0, turns, *ORDER), count=11)
        assert np.array_equal(make_compiled(make_extremes(16), ops, 16), make_by_pillow(make_extremes(16), ops, 16))


def test_changes_follow_their_order() -> None:
    for order in ((3.0, 2.0, 1.0, 0.0), (1.0, 3.0, 0.0, 2.0)):
        ops = draw_batch(CropBox(0.0, 0.0, 20.0, 20.0), Jitter(1.5, 0.4, 1.9, 0.2, *order), count=11)
        assert np.array_equal(make_compiled(make_extremes(20), ops, 20), make_by_pillow(make_extremes(20), ops, 20))


def test_one_channel_of_each_hue_is_at_the_top_and_one_at_the_bottom() -> None:
    assert SATURATED_DROPS.shape == (3, 256)
    assert (SATURATED_DROPS.min(0) == 0.0).all()
    assert (SATURATED_DROPS.max(0) == 1.0).all()

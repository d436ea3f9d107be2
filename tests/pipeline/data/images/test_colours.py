"""Mean and deviation of colours, whatever the order and size of the images."""

import json

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images.colours import MIN_DEVIATION, ColourSums


def noise(seed: int, side: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((side, side, 3)) ** np.array([1.0, 2.0, 4.0]) * 255).astype(np.uint8)


def sums_of(arrays: list[np.ndarray]) -> ColourSums:
    sums = ColourSums()
    for array in arrays:
        sums.add_image(Image.fromarray(array))
    return sums


def test_mean_and_deviation_are_those_of_all_pixels() -> None:
    arrays = [noise(k, 32) for k in range(5)]
    found, values = sums_of(arrays).compute_colours(), np.stack(arrays).reshape(-1, 3) / 255
    assert found.mean == pytest.approx(values.mean(0), abs=1e-4)
    assert found.std == pytest.approx(values.std(0), abs=1e-4)


def test_large_images_are_sampled_and_count_like_small_ones() -> None:
    large = sums_of([noise(0, 500)]).compute_colours()
    assert large.mean == pytest.approx((noise(0, 500) / 255).mean((0, 1)), abs=0.02)
    assert large.std == pytest.approx((noise(0, 500) / 255).std((0, 1)), abs=0.02)
    both = sums_of([np.zeros((300, 300, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)]).compute_colours()
    assert both.mean == (0.5, 0.5, 0.5)
    assert both.std == (0.5, 0.5, 0.5)


def test_sums_of_parts_do_not_depend_on_their_order() -> None:
    parts = [json.loads(json.dumps(sums_of([noise(k, 20 + k)]).dump_sums())) for k in range(6)]
    one, other = ColourSums(), ColourSums()
    for k in range(6):
        one.merge_sums(parts[k])
        other.merge_sums(parts[5 - k])
    assert one == other == sums_of([noise(k, 20 + k) for k in range(6)])


def test_images_of_one_colour_have_a_deviation() -> None:
    assert sums_of([np.full((8, 8, 3), 7, np.uint8)]).compute_colours().std == (MIN_DEVIATION,) * 3

"""The parameters that are drawn for changes of levels and for erasing: probabilities, ranges and distributions."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import v2

from firstlight.pipeline.data.augment.op_params import OpBatch
from firstlight.pipeline.data.augment.ops import sample_params
from firstlight.pipeline.data.augment.pixel_params import NOISE
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys

COUNT, SIDE = 3000, 32


def draw_op(name: str, side: int = SIDE, **parameters: Any) -> np.ndarray:
    """Returns the (COUNT, k) parameters of an op for images 0, 1, ..."""
    ids = np.arange(COUNT)
    keys = derive_view_keys(0, ids * 0, ids, 0)
    batch: OpBatch = sample_params([{"op": name, **parameters}], keys, np.full((COUNT, 2), 40), side)[0]
    return batch.rows


NEUTRAL = {
    "gaussian_blur": 0.0,
    "solarize": 256.0,
    "posterize": 8.0,
    "equalize": 0.0,
    "autocontrast": 0.0,
    "sharpness": 1.0,
}


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_share_of_changed_images_is_p(name: str, p: float) -> None:
    rows = draw_op(name, p=p, **({"bits": 5} if name == "posterize" else {}))
    assert (rows[:, 0] != NEUTRAL[name]).mean() == pytest.approx(p, abs=0.035 * (0.0 < p < 1.0))


def test_changes_have_the_parameters_of_the_recipe() -> None:
    assert set(draw_op("solarize", threshold=77, p=1.0)[:, 0]) == {77}
    assert set(draw_op("posterize", bits=2, p=1.0)[:, 0]) == {2}
    assert set(draw_op("sharpness", sharpness_factor=0.4, p=1.0)[:, 0]) == {0.4}


def test_sigma_of_a_blur_is_uniform_in_its_range() -> None:
    assert kstest(draw_op("gaussian_blur", p=1.0, sigma=(0.5, 3.0))[:, 0], "uniform", (0.5, 2.5)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("side", "kernel_size", "width"),
    [(8, None, 3), (32, None, 3), (96, None, 9), (224, None, 23), (384, None, 39), (32, 5, 5), (32, 4, 5), (8, 63, 63)],
)
def test_width_of_a_blur_follows_the_view_or_the_recipe(side: int, kernel_size: int | None, width: int) -> None:
    assert set(2 * draw_op("gaussian_blur", side, kernel_size=kernel_size)[:, 1] + 1) == {width}


def test_boxes_of_random_erasing_are_distributed_as_torchvisions() -> None:
    theirs, image = [], torch.zeros(3, SIDE, SIDE)
    transform = v2.RandomErasing(p=1.0)
    torch.manual_seed(0)
    for _ in range(COUNT):
        box = transform.make_params([image])
        theirs.append((box["j"], box["i"], box["j"] + box["w"], box["i"] + box["h"]))
    left, top, right, bottom = draw_op("random_erasing", p=1.0)[:, :4].T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= SIDE).all()
    assert (bottom <= SIDE).all()
    ours = np.stack((left, top, right, bottom, (right - left) * (bottom - top), (bottom - top) / (right - left)))
    x, y, x2, y2 = np.array(theirs).T.astype(float)
    for mine, other in zip(ours, (x, y, x2, y2, (x2 - x) * (y2 - y), (y2 - y) / (x2 - x)), strict=True):
        assert ks_2samp(mine, other).pvalue > 1e-3


def test_box_that_never_fits_and_image_that_is_not_chosen_are_not_erased() -> None:
    for chosen in ({"p": 0.0}, {"p": 1.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}):
        rows = draw_op("random_erasing", **chosen)
        assert np.array_equal(rows[:, :2], rows[:, 2:4])
    assert (draw_op("random_erasing", p=0.3)[:, 2] > draw_op("random_erasing", p=0.3)[:, 0]).mean() == pytest.approx(
        0.3, abs=0.035
    )


@pytest.mark.parametrize(("value", "level"), [("black", 0), ("gray", 127), ("noise", NOISE)])
@pytest.mark.parametrize("name", ["random_erasing", "cutout"])
def test_erased_pixels_have_the_value_of_the_recipe(name: str, value: str, level: int) -> None:
    rows = draw_op(name, value=value)
    assert set(rows[:, 4]) == {level}
    assert len(set(rows[:, 5])) == COUNT
    assert np.array_equal(rows[:, 5], rows[:, 5].astype(np.uint64).astype(float))


def test_cut_out_square_is_cut_at_the_edges_and_its_centre_is_uniform() -> None:
    """DeVries and Taylor: from 8 before to 8 behind a pixel of 32, so that the edge cuts off every second square."""
    left, top, right, bottom = draw_op("cutout")[:, :4].T
    for start, stop in ((left, right), (top, bottom)):
        assert start.min() == 0
        assert stop.max() == SIDE
        assert set(stop - start) == set(range(8, 17))
        centre = np.where(start > 0, start + 8, stop - 8)
        assert np.bincount(centre.astype(int), minlength=SIDE).min() > COUNT / SIDE / 2
        assert (start == 0).mean() == pytest.approx(9 / SIDE, abs=0.04)


@pytest.mark.parametrize(
    ("chosen", "side"), [({"scale": 0.25}, 8), ({"size": 5}, 5), ({"size": 500}, 32), ({"scale": 1.0}, 32), ({}, 16)]
)
def test_side_of_a_cut_out_square_is_a_share_or_pixels(chosen: dict[str, Any], side: int) -> None:
    left, _, right, _ = draw_op("cutout", **chosen)[:, :4].T
    assert (right - left).max() == side


def test_random_side_of_a_cut_out_square_is_uniform() -> None:
    """Seen in the middle, where no square of up to 100 of 200 pixels is cut off."""
    left, _, right, _ = draw_op("cutout", 200, sizes="random", scale=0.5)[:, :4].T
    sides = (right - left)[abs(left + right - 200) < 80]
    assert kstest((sides + 0.5) / 101, "uniform").pvalue > 1e-3
    assert sides.min() == 0
    assert sides.max() == 100


def test_share_of_cut_out_images_is_p() -> None:
    left, _, right, _ = draw_op("cutout", p=0.4)[:, :4].T
    assert (right > left).mean() == pytest.approx(0.4, abs=0.035)

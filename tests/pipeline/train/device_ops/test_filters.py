"""Filters and erasing of a batch have the pixels of one image at a time, bit by bit, and blurs are torchvision's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from firstlight.pipeline.data.augment.op_params import OpBatch, OpParams
from firstlight.pipeline.data.augment.pixel_params import NOISE, Blur, Erase, Sharpness
from firstlight.pipeline.train.device_ops.augment_batch import augment_batch
from firstlight.pipeline.train.device_ops.filters import blur_batch, erase_batch, sharpen_batch
from tests.support.noise_images import make_extremes, to_batch_of_images


def check_equal_pixels(kind: type[OpParams], rows: list[tuple[float, ...]], side: int) -> None:
    """Compares the op on every image with every row of parameters, mixed in one batch, with one image at a time."""
    images = make_extremes(side).repeat(len(rows), 0)
    op = OpBatch(kind, np.tile(np.array(rows, np.float64), (len(images) // len(rows), 1)))
    before = to_batch_of_images(images)
    held = before.clone()
    found = augment_batch(held, [op], side)
    expected = [
        np.asarray(params.apply_to(Image.fromarray(image), side))
        for image, params in zip(images, op.params_per_image(), strict=True)
    ]
    assert torch.equal(found, to_batch_of_images(np.stack(expected)))
    assert torch.equal(held, before), "what is held was changed"
    assert not torch.equal(found, before)


@pytest.mark.parametrize("side", [8, 13, 32, 96])
def test_blurs_of_several_widths_are_those_of_one_image(side: int) -> None:
    sigmas = np.random.default_rng(side).uniform(0.1, 3.0, 8).tolist()
    check_equal_pixels(Blur, [(0.0, 1.0), *((sigma, radius) for sigma in sigmas for radius in (1.0, 4.0))], side)


def test_largest_sums_of_a_blur_are_exact() -> None:
    """White images with the widest Gaussian have the largest sums."""
    images = torch.full((3, 3, 40, 40), 255, dtype=torch.uint8)
    assert torch.equal(blur_batch(images, np.array([(100.0, 31.0), (0.01, 31.0), (3.0, 31.0)]), 40), images)


@pytest.mark.parametrize(("sigma", "radius"), [(0.4, 1), (2.0, 1), (1.0, 4), (2.0, 4)])
def test_blur_of_a_batch_is_torchvisions_to_one_level(sigma: float, radius: int) -> None:
    images = to_batch_of_images(make_extremes(32))
    expected = functional.gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)
    found = blur_batch(images, np.tile((sigma, float(radius)), (len(images), 1)), 32)
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("side", [1, 2, 3, 8, 32, 95])
def test_sharpness_is_pillows(side: int) -> None:
    images, factors = make_extremes(side), np.linspace(0.0, 3.0, 11)
    expected = np.stack(
        [
            np.asarray(Sharpness(factor).apply_to(Image.fromarray(image), side))
            for image, factor in zip(images, factors, strict=True)
        ]
    )
    assert torch.equal(sharpen_batch(to_batch_of_images(images), factors[:, None], side), to_batch_of_images(expected))


@pytest.mark.parametrize("side", [8, 32, 96])
def test_erased_boxes_and_noise_are_those_of_one_image(side: int) -> None:
    whole, largest = float(side), float(2**53 - 1)
    rows = [
        (0.0, 0.0, 0.0, 0.0, 127.0, 3.0),
        (2.0, 1.0, 5.0, 8.0, 127.0, 4.0),
        (0.0, 0.0, whole, whole, 0.0, 5.0),
        (3.0, 3.0, 3.0, 7.0, float(NOISE), 6.0),
        (1.0, 2.0, 8.0, 7.0, float(NOISE), largest),
        (0.0, 0.0, whole, whole, float(NOISE), 12345.0),
    ]
    check_equal_pixels(Erase, rows, side)


def test_noise_differs_between_images_of_a_batch() -> None:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    found = erase_batch(images, np.array([(0, 0, 16, 16, NOISE, 1), (0, 0, 16, 16, NOISE, 2)], np.float64), 16)
    assert (found[0] != found[1]).float().mean() > 0.97

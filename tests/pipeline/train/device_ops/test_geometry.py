"""Flips, shifts and affine maps are those of numpy, for any number of channels and any type."""

import numpy as np
import pytest
import torch
from torch import Tensor

from firstlight.pipeline.train.device_ops.geometry import (
    flip_batch,
    flip_batch_vertically,
    interpolate_affine,
    place_shifted,
)

IDENTITY = np.array([[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]] * 2)


def levels(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(2 * channels * 16).reshape(2, channels, 4, 4).to(dtype)


@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.uint8), (1, torch.int32), (13, torch.int32)])
def test_only_chosen_images_are_flipped(channels: int, dtype: torch.dtype) -> None:
    images = levels(channels, dtype)
    for flip, axis in ((flip_batch, 2), (flip_batch_vertically, 1)):
        found = flip(images, np.array([[0.0], [1.0]]), 4)
        assert torch.equal(found[0], images[0])
        assert torch.equal(found[1], images[1].flip(axis))


def test_shifted_image_is_zero_where_it_was() -> None:
    images = levels(2, torch.int32) + 1
    found = place_shifted(images, np.array([[1.0, 0.0], [0.0, -2.0]]))
    assert torch.equal(found[0, :, :, 1:], images[0, :, :, :-1])
    assert not found[0, :, :, 0].any()
    assert torch.equal(found[1, :, :2], images[1, :, 2:])
    assert not found[1, :, 2:].any()


def test_identity_keeps_levels_and_half_a_pixel_averages_two() -> None:
    images = levels(13, torch.int32)
    assert torch.equal(interpolate_affine(images, IDENTITY, 4), images.double())
    moved = interpolate_affine(images, IDENTITY + np.array([0, 0, 0.5, 0, 0, 0]), 4)
    torch.testing.assert_close(moved[..., :3], (images[..., :3] + images[..., 1:]).double() / 2, rtol=0, atol=0)

"""Filters and erasing of many images at once on any device, with the pixels of `augment.pixel_params`, bit by bit."""

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.data.augment.pixel_params import (
    BLUR_LEVEL_PARTS,
    BLUR_WEIGHT_SUM,
    NOISE,
    blur_weights,
    reflect_indices,
)
from firstlight.pipeline.data.channels.channel_ops import scale_fill_level
from firstlight.pipeline.train.device_ops.colors import blend_images, expand_per_image
from firstlight.tasks.counter_rng import draw_uniform
from firstlight.tasks.device.copies import send_array


def blur_batch(images: Tensor, drawn: np.ndarray, size: int, number: torch.dtype = torch.float32) -> Tensor:
    """Blurs (B, C, H, W) levels by Gaussians, first down the columns, then along the rows.

    `number`: a type that has the sums exactly: float32 for levels of 8 bits, float64 for those of 16.
    """
    images = images.clone()
    for radius in np.unique(drawn[drawn[:, 0] > 0.0, 1]).astype(int).tolist():
        rows = np.flatnonzero((drawn[:, 0] > 0.0) & (drawn[:, 1] == radius))
        index = send_array(rows, images.device)
        weights = send_array(blur_weights(drawn[rows, 0], radius), images.device).to(number)
        levels = images[index].to(number)
        for axis, scale in ((2, BLUR_WEIGHT_SUM / BLUR_LEVEL_PARTS), (3, BLUR_WEIGHT_SUM * BLUR_LEVEL_PARTS)):
            levels = _sum_weighted_taps(levels, weights, axis).add_(scale / 2).div_(scale).floor_()
        images[index] = levels.to(images.dtype)
    return images


def _sum_weighted_taps(levels: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Returns the sums of (B, C, H, W) levels along an axis, weighted by (B, radius + 1) numbers of the same type."""
    side, radius = levels.shape[axis], weights.shape[1] - 1
    continued = levels.index_select(axis, send_array(reflect_indices(side, radius), levels.device))
    total = continued.narrow(axis, radius, side) * weights[:, 0, None, None, None]
    for distance in range(1, radius + 1):
        both = continued.narrow(axis, radius - distance, side) + continued.narrow(axis, radius + distance, side)
        total.addcmul_(both, weights[:, distance, None, None, None])
    return total


def sharpen_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Blends images with their smoothed versions, as `PIL.ImageEnhance.Sharpness`."""
    rows = np.flatnonzero(drawn[:, 0] != 1.0)
    if not len(rows):
        return images
    images, index = images.clone(), send_array(rows, images.device)
    images[index] = blend_images(_smooth_images(images[index]).float(), images[index], drawn[rows, 0])
    return images


def _smooth_images(images: Tensor) -> Tensor:
    """Averages 3 x 3 pixels, of which that in the middle counts five times; the outermost pixels stay."""
    levels = images.short()
    lines = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    inner = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * levels[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    # A thirteenth is never so near to half way between two levels that float32 rounds it to the other.
    smooth[:, :, 1:-1, 1:-1] = inner.float().div_(13.0).add_(0.5).to(torch.uint8)
    return smooth


def erase_batch(images: Tensor, drawn: np.ndarray, size: int, white: int = 255) -> Tensor:
    """Erases a box of each of (B, C, size, size) images, to a level or to noise of the key that was drawn for it.

    `white`: the highest level. The level of a box is stated in 0..255, and stands for the same share of it.
    """
    left, top, right, bottom = (expand_per_image(column, images) for column in np.ascontiguousarray(drawn[:, :4].T))
    position = torch.arange(size, device=images.device)
    rows = (position[:, None] >= top) & (position[:, None] < bottom)
    inside = rows & (position >= left) & (position < right)
    fills = np.array([scale_fill_level(max(level, 0.0), white) for level in drawn[:, 4]], np.int32)
    erased = torch.where(inside, expand_per_image(fills, images).to(images.dtype), images)
    noisy = np.flatnonzero((drawn[:, 4] == NOISE) & (drawn[:, 2] > drawn[:, 0]))
    if len(noisy):
        index, keys = send_array(noisy, images.device), send_array(drawn[noisy, 5].astype(np.int64), images.device)
        channels = images.shape[1]
        numbers = draw_uniform(keys, size * size * channels).mul_(float(white + 1)).to(images.dtype)
        noise = numbers.unflatten(1, (size, size, channels)).permute(0, 3, 1, 2)
        erased[index] = torch.where(inside[index], noise, erased[index])
    return erased

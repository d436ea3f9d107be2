"""Flips, shifts and affine maps of many images at once on any device, for levels of any type and number of channels."""

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.train.device_ops.colors import expand_per_image
from firstlight.tasks.device.copies import send_array


def gather_pixels(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Gathers (B, C, h, w) pixels of (B, C, H, W) at rows `y` and columns `x`, which broadcast to (B, 1, h, w)."""
    flat = (y * images.shape[3] + x).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    taken: Tensor = images.flatten(2).gather(2, flat).unflatten(2, (y.shape[2], x.shape[3]))
    return taken


def flip_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    rows = send_array(np.flatnonzero(drawn[:, 0]), images.device)
    return images.index_copy(0, rows, images[rows].flip(3))


def flip_batch_vertically(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    rows = send_array(np.flatnonzero(drawn[:, 0]), images.device)
    return images.index_copy(0, rows, images[rows].flip(2))


def place_shifted(square: Tensor, offsets: np.ndarray) -> Tensor:
    """Moves (B, C, S, S) images by (B, 2) offsets to the right and down; uncovered pixels are 0."""
    size = square.shape[2]
    right, down = send_array(offsets.T.astype(np.int64), square.device)
    positions = torch.arange(size, device=square.device)
    x, y = (positions - right[:, None])[:, None, None, :], (positions - down[:, None])[:, None, :, None]
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    return torch.where(inside, gather_pixels(square, y.clamp(0, size - 1), x.clamp(0, size - 1)), 0)


def interpolate_affine(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Returns (B, C, size, size) float64 levels of images under affine maps, bilinear between the centres of pixels.

    The outermost half pixel has the levels of the edge; outside is 0.
    """
    a, b, c, d, e, f = (expand_per_image(column, images) for column in np.ascontiguousarray(drawn.T))
    center = torch.arange(size, device=images.device, dtype=torch.float64) + 0.5
    x, y = a * center + b * center[:, None] + c, d * center + e * center[:, None] + f
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    right_share, low_share = x - 0.5 - left, y - 0.5 - top

    def interpolate_row(y: Tensor) -> Tensor:
        near, far = (
            gather_pixels(images, y.long().clamp(0, size - 1), x.long().clamp(0, size - 1)).double()
            for x in (left, left + 1)
        )
        return near + (far - near) * right_share

    upper = interpolate_row(top)
    return torch.where(inside, upper + (interpolate_row(top + 1) - upper) * low_share, 0.0)

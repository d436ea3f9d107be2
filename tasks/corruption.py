"""Corruptions of images (Dong et al. 2016, arXiv 1611.09119, section 3.3), for a whole batch at once, on its device.

Every number is a function of the image's key (see `firstlight.tasks.counter_rng`), so an image is corrupted in the same way whichever batch it is in.
Images are (B, C, S, S) in 0..1. Noise is not clipped to 0..1: clipping would make it neither Gaussian nor of zero mean near black and white,
and what the network sees is normalised in any case.
"""

import torch
from torch import Tensor

from firstlight.tasks.counter_rng import normal, uniform


def noise_levels(key: Tensor, low: float, high: float) -> Tensor:
    """(B,) keys -> (B,) standard deviations, uniform in [low, high)."""
    return low + (high - low) * uniform(key, 1)[:, 0]


def pixel_gaussian(images: Tensor, levels: Tensor, key: Tensor) -> Tensor:
    """Noise of its own for every pixel and channel; `levels` (B,) are standard deviations in the units of the images."""
    noise = normal(key, images[0].numel()).view_as(images)
    return images + levels.view(-1, 1, 1, 1) * noise


def patch_gaussian(images: Tensor, levels: Tensor, key: Tensor, patch: int) -> Tensor:
    """The image is divided into squares of `patch` pixels (cut off at the right and the bottom); the pixels of one share their noise."""
    channels, size = images.shape[1:3]
    cells = -(-size // patch)
    noise = normal(key, channels * cells**2).view(-1, channels, cells, cells)
    noise = noise.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[:, :, :size, :size]
    return images + levels.view(-1, 1, 1, 1) * noise


def random_squares(key: Tensor, count: int, sides: tuple[int, int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) keys -> sides, tops and lefts (B, count) int64 of squares inside a size x size image; the bounds `sides` are included."""
    low, high = sides
    # In float64 the product stays below the integer it must not reach.
    side, top, left = uniform(key, 3 * count).double().split(count, dim=1)
    side = low + (side * (high - low + 1)).long()
    free = size - side + 1
    return side, (top * free).long(), (left * free).long()


def covered(side: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """(B, n) squares -> (B, 1, size, size) bool, true inside the union of an image's squares.

    The product of row and column indicators counts the squares over a pixel: no loop over images or squares, no (B, n, size, size) tensor.
    """
    places = torch.arange(size, device=side.device)
    rows = (places >= top[..., None]) & (places < (top + side)[..., None])
    columns = (places >= left[..., None]) & (places < (left + side)[..., None])
    counts = torch.bmm(rows.float().transpose(1, 2), columns.float())
    return (counts > 0)[:, None]


def big_block_sides(size: int) -> tuple[int, int]:
    """The whole numbers in [l/4, l/2], l the side of the image (supplement A)."""
    low = max(1, -(-size // 4))
    return low, max(low, size // 2)


def small_block_side(size: int) -> int:
    """l/8 to the nearest pixel (supplement A): for l = 29 the blocks are of 4 pixels."""
    return max(1, (size + 4) // 8)


def small_block_count(images: int) -> int:
    """How many blocks an image gets, by the number of images trained on (supplement A)."""
    return 21 if images < 100_000 else 35

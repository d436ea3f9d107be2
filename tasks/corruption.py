"""Corruptions of images (Dong et al. 2016, arXiv 1611.09119, section 3.3), for a whole batch on its device.

Every number is a function of the image's key (see `firstlight.tasks.counter_rng`), so an image is corrupted in the same
way whichever batch it is in. Images are (B, C, S, S) in 0..1. Noise is not clipped to 0..1: clipping would make it
neither Gaussian nor of zero mean near black and white, and the input of the network is normalised in any case.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from firstlight.tasks.counter_rng import derive_keys, draw_normal, draw_uniform
from firstlight.tasks.nn import CorruptionKind

# The streams of random numbers: of the noise levels, and of the noise or the blocks.
LEVEL_STREAM, NOISE_STREAM = 0, 1


@dataclass(frozen=True)
class Corruption:
    """A corruption with its parameters; the random numbers of an image are those of (seed, pass, id)."""

    kind: CorruptionKind
    # The bounds of the noise level of an image, in 0..255.
    sigma: tuple[float, float]
    # The side in pixels of the squares of `patch_gaussian`.
    patch: int
    # The number of `small_blocks`.
    blocks: int
    seed: int

    def apply_to(self, images: Tensor, ids: Tensor, passes: Tensor, mean: Tensor) -> Tensor:
        """Corrupts (B, C, S, S) images in 0..1, whose (B,) ids and passes decide how (section 3.4).

        `mean`: (1, C, 1, 1), the value of blocks.
        """
        key = derive_keys(self.seed, passes, ids, NOISE_STREAM)
        if self.kind in ("pixel_gaussian", "patch_gaussian"):
            low, high = self.sigma
            levels = draw_noise_levels(derive_keys(self.seed, passes, ids, LEVEL_STREAM), low / 255, high / 255)
            if self.kind == "pixel_gaussian":
                return add_pixel_noise(images, levels, key)
            return add_patch_noise(images, levels, key, self.patch)
        return torch.where(self._draw_blocks(key, images.shape[-1]), mean.to(images), images)

    def _draw_blocks(self, key: Tensor, size: int) -> Tensor:
        """Returns (B, 1, size, size) bool for (B,) keys, true where an image is blocked out."""
        if self.kind == "big_block":
            squares = draw_squares(key, 1, big_block_sides(size), size)
        else:
            side = small_block_side(size)
            squares = draw_squares(key, self.blocks, (side, side), size)
        return mask_squares(*squares, size)


def split_patches(key: Tensor, count: int, masked_share: float) -> tuple[Tensor, Tensor]:
    """Splits the `count` patches of images with (B,) keys at random (MAE: He et al. 2021, section 3, "Masking").

    Returns the (B, K) int64 numbers of visible patches and the (B, M) numbers of masked ones. K is
    (1 - masked_share) * count, rounded down as in the authors' code.
    """
    order = draw_uniform(key, count).argsort(dim=1, stable=True)
    kept = int(count * (1.0 - masked_share))
    return order[:, :kept], order[:, kept:]


def draw_noise_levels(key: Tensor, low: float, high: float) -> Tensor:
    """Returns (B,) standard deviations for (B,) keys, uniform in [low, high)."""
    return low + (high - low) * draw_uniform(key, 1)[:, 0]


def add_pixel_noise(images: Tensor, levels: Tensor, key: Tensor) -> Tensor:
    """Adds independent Gaussian noise to every pixel and channel.

    `levels`: (B,) standard deviations in the units of the images.
    """
    noise = draw_normal(key, images[0].numel()).view_as(images)
    return images + levels.view(-1, 1, 1, 1) * noise


def add_patch_noise(images: Tensor, levels: Tensor, key: Tensor, patch: int) -> Tensor:
    """Adds Gaussian noise that the pixels of a square of side `patch` share.

    The squares tile the image, and are cut off at the right and the bottom.
    """
    channels, size = images.shape[1:3]
    cells = -(-size // patch)
    noise = draw_normal(key, channels * cells**2).view(-1, channels, cells, cells)
    noise = noise.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[:, :, :size, :size]
    return images + levels.view(-1, 1, 1, 1) * noise


def draw_squares(key: Tensor, count: int, sides: tuple[int, int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns sides, tops and lefts, each (B, count) int64, of squares inside a size x size image, for (B,) keys.

    The bounds `sides` are included.
    """
    low, high = sides
    # The product stays in float64 below the integer that it must not reach.
    side, top, left = draw_uniform(key, 3 * count).double().split(count, dim=1)
    side = low + (side * (high - low + 1)).long()
    free = size - side + 1
    return side, (top * free).long(), (left * free).long()


def mask_squares(side: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Returns (B, 1, size, size) bool, true inside the union of an image's (B, n) squares.

    The product of row and column indicators counts the squares over a pixel: no loop over images or squares, no
    (B, n, size, size) tensor.
    """
    pixels = torch.arange(size, device=side.device)
    rows = (pixels >= top[..., None]) & (pixels < (top + side)[..., None])
    columns = (pixels >= left[..., None]) & (pixels < (left + side)[..., None])
    counts = torch.bmm(rows.float().transpose(1, 2), columns.float())
    return (counts > 0)[:, None]


def big_block_sides(size: int) -> tuple[int, int]:
    """Returns the smallest and the largest whole number in [l/4, l/2], with l the side of the image (supplement A)."""
    low = max(1, -(-size // 4))
    return low, max(low, size // 2)


def small_block_side(size: int) -> int:
    """Returns l/8 rounded to a pixel, with l the side of the image (supplement A): 4 pixels for l = 29."""
    return max(1, (size + 4) // 8)


def small_block_count(images: int) -> int:
    """Returns the number of blocks of an image, given the number of images trained on (supplement A)."""
    return 21 if images < 100_000 else 35

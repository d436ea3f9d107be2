"""The parameters of ops that change levels and leave every pixel where it is, and their application with PIL and numpy.

Sums of products are sums of integers below 2**24, which float32 has exactly in any order, so that numpy here and torch
on any device give the same pixels.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from firstlight.pipeline.data.augment.random_numbers import draw_levels

# A threshold that no level reaches.
NO_THRESHOLD = 256
# The level of an erased pixel that means noise.
NOISE = -1
# The sum of the weights of a blur, and the parts of a level that are kept between its two passes.
BLUR_WEIGHT_SUM, BLUR_LEVEL_PARTS = 2.0**14, 4.0


def _find_drops() -> np.ndarray:
    position = np.arange(256) * 6.0 / 255.0
    sixth = np.floor(position).astype(np.int64) % 6
    rest = (position - np.floor(position)).astype(np.float32)
    # The levels of a channel at the top, rising, falling and at the bottom.
    levels = np.stack((np.zeros(256, np.float32), np.float32(1.0) - rest, rest, np.ones(256, np.float32)), 1)
    kinds = np.array([[0, 1, 3], [2, 0, 3], [3, 0, 1], [3, 2, 0], [1, 3, 0], [0, 3, 2]])[sixth]
    return np.ascontiguousarray(np.take_along_axis(levels, kinds, 1).T)


# (3, 256) float32: how far red, green and blue are below the value at full saturation, for each level of hue.
SATURATED_DROPS = _find_drops()


class Solarize(NamedTuple):
    """Levels of at least `threshold` are inverted."""

    threshold: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return image if self.threshold >= NO_THRESHOLD else ImageOps.solarize(image, math.ceil(self.threshold))


class Posterize(NamedTuple):
    """Only the highest `bits` of each level are kept."""

    bits: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return image if self.bits >= 8 else ImageOps.posterize(image, int(self.bits))


class Equalize(NamedTuple):
    """The levels of each channel become as equally frequent as a map of levels can make them, if `equalized` is 1."""

    equalized: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return ImageOps.equalize(image) if self.equalized else image


class AutoContrast(NamedTuple):
    """The levels of each channel are stretched to 0..255 if `stretched` is 1."""

    stretched: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return ImageOps.autocontrast(image) if self.stretched else image


class Sharpness(NamedTuple):
    """The difference from a smoothed image is multiplied by `factor`: 0 smooths, 1 changes nothing, 2 sharpens."""

    factor: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return image if self.factor == 1.0 else ImageEnhance.Sharpness(image).enhance(self.factor)


class Blur(NamedTuple):
    """A Gaussian of standard deviation `sigma`, cut off beyond `radius` pixels; 0 changes nothing.

    Beyond its edges the image is reflected, without the outermost pixels.
    """

    sigma: float
    radius: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        if not self.sigma:
            return image
        return Image.fromarray(self.blur_levels(np.asarray(image).astype(np.float32)).astype(np.uint8))

    def blur_levels(self, levels: np.ndarray) -> np.ndarray:
        """Returns blurred (H, W, C) levels: whole numbers of 8 bits in float32, or of up to 16 bits in float64."""
        weights = blur_weights(np.array([self.sigma]), int(self.radius))[0]
        for axis, scale in enumerate((BLUR_WEIGHT_SUM / BLUR_LEVEL_PARTS, BLUR_WEIGHT_SUM * BLUR_LEVEL_PARTS)):
            levels = np.floor((_sum_taps(levels, weights, axis) + scale / 2) / scale)
        return levels


class Erase(NamedTuple):
    """The pixels of a box, its right and bottom excluded, become `level`, or noise of `key` if that is `NOISE`."""

    left: float
    top: float
    right: float
    bottom: float
    level: float
    key: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        columns, rows = slice(int(self.left), int(self.right)), slice(int(self.top), int(self.bottom))
        pixels = np.array(image)
        if self.level == NOISE:
            noise = draw_levels(np.array([self.key]).astype(np.uint64), pixels.size)
            pixels[rows, columns] = noise.reshape(pixels.shape)[rows, columns]
        else:
            pixels[rows, columns] = int(self.level)
        return Image.fromarray(pixels)


def blur_weights(sigmas: np.ndarray, radius: int) -> np.ndarray:
    """Returns (B, radius + 1) float32 integers for (B,) deviations: the weights of pixels at distances 0 .. `radius`.

    The weights of both sides together have the sum BLUR_WEIGHT_SUM.
    """
    shares = np.exp(-0.5 * (np.arange(radius + 1) / sigmas[:, None]) ** 2)
    shares /= shares[:, :1] + 2.0 * shares[:, 1:].sum(1, keepdims=True)
    weights: np.ndarray = np.rint(shares * BLUR_WEIGHT_SUM).astype(np.float32)
    weights[:, 0] = BLUR_WEIGHT_SUM - 2.0 * weights[:, 1:].sum(1)
    return weights


@lru_cache(maxsize=64)
def reflect_indices(side: int, radius: int) -> np.ndarray:
    """Returns (side + 2 radius,) the pixels of a line of `side` that is continued by reflection at both ends."""
    period = max(1, 2 * side - 2)
    position = np.arange(-radius, side + radius) % period
    pixels: np.ndarray = np.minimum(position, period - position)
    return pixels


def _sum_taps(levels: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Returns the weighted sums of (H, W, C) levels along an axis."""
    side, radius = levels.shape[axis], len(weights) - 1
    continued = np.moveaxis(levels.take(reflect_indices(side, radius), axis), axis, 0)
    total = continued[radius : radius + side] * weights[0]
    both = np.empty_like(total)
    for distance, weight in enumerate(weights[1:], 1):
        before, after = radius - distance, radius + distance
        np.add(continued[before : before + side], continued[after : after + side], out=both)
        both *= weight
        total += both
    sums: np.ndarray = np.moveaxis(total, 0, axis)
    return sums

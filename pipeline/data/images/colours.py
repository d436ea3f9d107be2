"""The mean and the standard deviation of the colours of a set of images: what a network's input is normalised with.

Every image counts alike, whatever its size. The sums are whole numbers, so that they do not depend on the order in
which parts are added up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Pixels of a large image that are looked at, in rows and columns that are evenly spaced.
SAMPLED_SIDE = 64
# Means of values in 0..1 are counted in units of 2 ** -FIXED_POINT_BITS.
FIXED_POINT_BITS = 32
# A channel that never changes has no deviation to divide by. With 16 bits, data of few of them have small deviations.
MIN_DEVIATION, MIN_DEEP_DEVIATION = 1e-3, 1e-5
# The digits of means and deviations, of levels of 8 bits and of more.
DIGITS, DEEP_DIGITS = 4, 8
WHITE = 255
LEVELS = np.arange(256)


class Colours(NamedTuple):
    """The mean and the standard deviation of each channel (red, green and blue by default), in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class ColourSums:
    """Sums over images of the means of the values, and of their squares, of each channel."""

    images: int = 0
    means: tuple[int, ...] = (0, 0, 0)
    squares: tuple[int, ...] = (0, 0, 0)

    def add_image(self, image: Image.Image) -> None:
        """Adds an image of mode RGB."""
        if image.width * image.height > SAMPLED_SIDE**2:
            image = image.resize((SAMPLED_SIDE, SAMPLED_SIDE), Image.Resampling.NEAREST)
        counts, pixels = np.array(image.histogram(), np.int64).reshape(3, 256), image.width * image.height
        self._add_totals((counts @ LEVELS).tolist(), (counts @ LEVELS**2).tolist(), pixels, WHITE)

    def add_levels(self, values: np.ndarray, white: int) -> None:
        """Adds an image of (H, W, C) levels of 0..`white`."""
        height, width = values.shape[:2]
        if height * width > SAMPLED_SIDE**2:
            rows, columns = (np.arange(SAMPLED_SIDE) * side // SAMPLED_SIDE for side in (height, width))
            values = values[rows[:, None], columns]
        levels = values.reshape(-1, values.shape[2]).astype(np.int64)
        self._add_totals(levels.sum(0).tolist(), (levels**2).sum(0).tolist(), len(levels), white)

    def _add_totals(self, means: list[int], squares: list[int], pixels: int, white: int) -> None:
        """Adds the sums over the pixels of an image."""
        shares = [(value << FIXED_POINT_BITS) // (white * pixels) for value in means]
        of_squares = [(value << FIXED_POINT_BITS) // (white**2 * pixels) for value in squares]
        self._extend(1, shares, of_squares)

    def _extend(self, images: int, means: Sequence[int], squares: Sequence[int]) -> None:
        if not self.images:
            self.means = self.squares = (0,) * len(means)
        self.images += images
        self.means = tuple(map(sum, zip(self.means, means, strict=True)))
        self.squares = tuple(map(sum, zip(self.squares, squares, strict=True)))

    def dump_sums(self) -> dict[str, Any]:
        """Returns the sums as JSON, for `merge_sums`."""
        return {"images": self.images, "means": list(self.means), "squares": list(self.squares)}

    def merge_sums(self, raw: Mapping[str, Any]) -> None:
        """Adds the sums that another object dumped."""
        if raw["images"]:
            self._extend(raw["images"], raw["means"], raw["squares"])

    def compute_colours(self, white: int = WHITE) -> Colours:
        """Returns mean and deviation, rounded to four digits; to eight if levels go up to more than 255."""
        scale, digits = self.images << FIXED_POINT_BITS, DIGITS if white == WHITE else DEEP_DIGITS
        least = MIN_DEVIATION if white == WHITE else MIN_DEEP_DEVIATION
        means = [value / scale for value in self.means]
        spreads = [max(value / scale - mean**2, 0.0) for value, mean in zip(self.squares, means, strict=True)]
        return Colours(
            tuple(round(mean, digits) for mean in means),
            tuple(max(round(spread**0.5, digits), least) for spread in spreads),
        )

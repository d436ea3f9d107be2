"""The mean and the standard deviation of the colours of a set of images: what a network's input is normalised with.

Every image counts alike, whatever its size. The sums are whole numbers, so that they do not depend on the order in
which parts are added up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Pixels of a large image that are looked at, in rows and columns that are evenly spaced.
SAMPLED_SIDE = 64
# Means of values in 0..1 are counted in units of 2 ** -FIXED_POINT_BITS.
FIXED_POINT_BITS = 32
# A channel that never changes has no deviation to divide by.
MIN_DEVIATION = 1e-3
LEVELS = np.arange(256)


class Colours(NamedTuple):
    """The mean and the standard deviation of red, green and blue, in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class ColourSums:
    """Sums over images of the means of the values, and of their squares, of each channel."""

    images: int = 0
    means: tuple[int, int, int] = (0, 0, 0)
    squares: tuple[int, int, int] = (0, 0, 0)

    def add_image(self, image: Image.Image) -> None:
        """Adds an image of mode RGB."""
        if image.width * image.height > SAMPLED_SIDE**2:
            image = image.resize((SAMPLED_SIDE, SAMPLED_SIDE), Image.Resampling.NEAREST)
        counts, pixels = np.array(image.histogram(), np.int64).reshape(3, 256), image.width * image.height
        self.images += 1
        self.means = self._add_shares(self.means, (counts @ LEVELS).tolist(), 255 * pixels)
        self.squares = self._add_shares(self.squares, (counts @ LEVELS**2).tolist(), 255**2 * pixels)

    def _add_shares(self, sums: tuple[int, int, int], values: list[int], total: int) -> tuple[int, int, int]:
        red, green, blue = (
            before + (value << FIXED_POINT_BITS) // total for before, value in zip(sums, values, strict=True)
        )
        return red, green, blue

    def dump_sums(self) -> dict[str, Any]:
        """Returns the sums as JSON, for `merge_sums`."""
        return {"images": self.images, "means": list(self.means), "squares": list(self.squares)}

    def merge_sums(self, raw: Mapping[str, Any]) -> None:
        """Adds the sums that another object dumped."""
        self.images += raw["images"]
        (a, b, c), (x, y, z) = raw["means"], raw["squares"]
        self.means = (self.means[0] + a, self.means[1] + b, self.means[2] + c)
        self.squares = (self.squares[0] + x, self.squares[1] + y, self.squares[2] + z)

    def compute_colours(self) -> Colours:
        """Returns mean and deviation, rounded to four digits."""
        scale = self.images << FIXED_POINT_BITS
        means = [value / scale for value in self.means]
        spreads = [max(value / scale - mean**2, 0.0) for value, mean in zip(self.squares, means, strict=True)]
        red, green, blue = (round(mean, 4) for mean in means)
        x, y, z = (max(round(spread**0.5, 4), MIN_DEVIATION) for spread in spreads)
        return Colours((red, green, blue), (x, y, z))

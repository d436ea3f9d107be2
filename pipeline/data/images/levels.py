"""Images with more than 8 bits a sample: the levels that occur in a data set decide what is black and what is white.

A file of 16 bits often holds data of 10, 12 or 14: divided by 257 they would be nearly black. So the levels of all
images are counted first, by kind of file, and each kind is then read with one range for the whole set.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from firstlight.pipeline.data.images.bad_image import BadImage

LevelKind = Literal["16-bit grey", "16-bit colour", "integers", "floats"]
# Kind -> the levels that are black and white.
LevelRanges = Mapping[str, tuple[float, float]]
# Integers of the first three kinds have at least 8 bits and at most 32.
MIN_DEPTH, MAX_DEPTH = 8, 32
# The exponent of a span of 0: below that of every float.
NO_SPAN = -2000
# An image whose highest level is below white by this factor is nearly black.
DARK_FACTOR_BITS = 4
# An image of 8 bits whose highest level is below this one is dark.
DARK_LEVEL = 32
# Pixels that are converted at a time.
BLOCK_PIXELS = 1_000_000


def find_level_kind(mode: str) -> LevelKind | None:
    """Returns the kind of levels of an image of one of Pillow's modes; None for 8 bits."""
    if mode.startswith("I;16"):
        return "16-bit grey"
    return {"I": "integers", "F": "floats"}.get(mode)  # type: ignore[return-value]


def find_value_range(values: np.ndarray) -> tuple[float, float]:
    """Returns the lowest and the highest of (H, W) or (H, W, C) values.

    Raises:
        BadImage: a value is not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise BadImage("holds values that are not finite", "levels")
    return low, high


def guess_level_range(kind: LevelKind, low: float, high: float) -> tuple[float, float]:
    """Returns black and white for one image of which nothing is known but its own values.

    16 bits are black at 0 and white at 65535, also where they are kept in 32; floats in 0..1 at 0 and 1. Other values
    have the image's own range.
    """
    full = 1.0 if kind == "floats" else 65535.0
    return (0.0, full) if low >= 0.0 and high <= full else (low, high)


def scale_to_8_bits(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Scales (H, W) or (H, W, C) values of any type to uint8; values beyond black and white are clipped."""
    span, scaled = (white - black) or 1.0, np.empty(values.shape, np.uint8)
    step = max(1, BLOCK_PIXELS // values[0].size)
    # The values in float64 take eight times the memory of the image, therefore some rows are summed at a time.
    for k in range(0, len(values), step):
        levels = (values[k : k + step].astype(np.float64) - black) * 255.0 / span
        scaled[k : k + step] = np.rint(np.clip(levels, 0.0, 255.0))
    return scaled


def list_pixel_readings(image: Image.Image) -> tuple[str, ...]:
    """Returns what is odd about the pixels of an RGB image, as names in `readings.READING_SENTENCES`."""
    corner = image.getpixel((0, 0))
    # Most images differ in two pixels already, so that the rest need not be looked at.
    is_plain = corner == image.getpixel((image.width // 2, image.height // 2))
    extrema: Any = image.getextrema()
    if is_plain and all(low == high for low, high in extrema):
        return ("one_colour",)
    return ("dark",) if max(high for _, high in extrema) < DARK_LEVEL else ()


@dataclass
class LevelCounts:
    """The levels of the images of one kind."""

    images: int = 0
    low: float = 0.0
    high: float = 0.0
    # `find_exponent` of the highest level of each image, and of highest - lowest.
    peaks: Counter[int] = field(default_factory=Counter)
    spans: Counter[int] = field(default_factory=Counter)

    def add_image(self, low: float, high: float) -> None:
        self._extend(low, high, 1)
        self.peaks[find_exponent(high)] += 1
        self.spans[find_exponent(high - low)] += 1

    def _extend(self, low: float, high: float, images: int) -> None:
        self.low = min(self.low, low) if self.images else low
        self.high = max(self.high, high) if self.images else high
        self.images += images

    def dump_counts(self) -> list[Any]:
        """Returns the counts as JSON, for `merge_counts`."""
        peaks, spans = (sorted(map(list, found.items())) for found in (self.peaks, self.spans))
        return [self.images, self.low, self.high, peaks, spans]

    def merge_counts(self, raw: list[Any]) -> None:
        """Adds the counts that another object dumped."""
        images, low, high, peaks, spans = raw
        self._extend(low, high, images)
        self.peaks.update(dict(map(tuple, peaks)))
        self.spans.update(dict(map(tuple, spans)))

    def count_dark(self, black: float, white: float) -> int:
        """Counts the images that use less than a sixteenth of the range; 0 where black is not 0."""
        limit = find_exponent(white) - DARK_FACTOR_BITS
        return 0 if black else sum(n for exponent, n in self.peaks.items() if exponent <= limit)

    def count_flat(self, black: float, white: float) -> int:
        """Counts the images whose levels lie within one step of the 255 that remain: one colour, or nearly so."""
        limit = find_exponent((white - black) / 255.0) - 1
        return sum(n for exponent, n in self.spans.items() if exponent <= limit)


def find_exponent(value: float) -> int:
    """Returns the e with 2 ** (e - 1) <= value < 2 ** e, which is the number of bits of an integer."""
    return math.frexp(value)[1] if value > 0.0 else NO_SPAN


def decide_level_range(kind: str, low: float, high: float, depth: int | None) -> tuple[float, float]:
    """Returns black and white for a set of images of one kind, whose levels are `low` to `high`.

    The range of integers is 0 to the highest level of `depth` bits; by default of the fewest bits that hold `high`, at
    least 8. If some are negative, it is that of signed integers of `depth` bits; by default `low` to `high`. The range
    of floats is 0 to 1 if `high` is above one half and at most 1, else 0 to `high`; it is `low` to `high` if some are
    negative.
    """
    if kind == "floats":
        return (min(low, 0.0), 1.0 if 0.5 < high <= 1.0 else high)
    if low < 0:
        return (low, high) if depth is None else (-(2.0 ** (depth - 1)), 2.0 ** (depth - 1) - 1)
    return 0.0, 2.0 ** (depth or max(MIN_DEPTH, find_exponent(high))) - 1


def list_depth_ranges(depth: int | None) -> LevelRanges:
    """Returns the ranges of integers of `depth` bits from 0 on, by kind; {} if it is None."""
    kinds: tuple[LevelKind, ...] = ("16-bit grey", "16-bit colour", "integers")
    return {} if depth is None else dict.fromkeys(kinds, (0.0, 2.0**depth - 1))


def check_not_dark(kind: str, low: float, high: float) -> None:
    """Checks that an image of which no depth is known uses more than a sixteenth of the range of its file.

    Raises:
        BadImage: it does not, and would be nearly black.
    """
    full = 1.0 if kind == "floats" else 65535.0
    if low >= 0.0 and high < full / (1 << DARK_FACTOR_BITS):
        bits = max(MIN_DEPTH, find_exponent(high))
        advice = "values of which 1 is white" if kind == "floats" else f"depth={bits}, the bits of the data, or 16"
        raise BadImage(f"has levels of {kind} up to {high:g}, and would be nearly black; valid: {advice}", "levels")


def check_depth(kind: str, low: float, high: float, depth: int) -> None:
    """Checks that the levels of an image fit `dataset.depth`; floats have no depth.

    Raises:
        BadImage: they do not.
    """
    lowest, highest = (-(2 ** (depth - 1)), 2 ** (depth - 1) - 1) if low < 0 else (0, 2**depth - 1)
    if kind != "floats" and (low < lowest or high > highest):
        outside = high if high > highest else low
        raise BadImage(f"has the level {outside:.0f}; dataset.depth: {depth} bits hold {lowest} to {highest}", "levels")

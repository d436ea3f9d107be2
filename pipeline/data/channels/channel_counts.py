"""The levels of each channel of a data set, counted while its images are decoded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.pixel_format import PixelFormat, parse_pixel_format
from firstlight.pipeline.data.images.colours import ColourSums

# Channels that the terminal lists.
MAX_LISTED_CHANNELS = 16


@dataclass
class ChannelCounts:
    """The format of the pixels, and the lowest and the highest level of each channel; no format without an image."""

    pixels: PixelFormat | None = None
    low: list[int] = field(default_factory=list)
    high: list[int] = field(default_factory=list)

    def add_image(self, image: ChannelImage) -> bool:
        """Counts an image; returns True if each of its channels has one level."""
        values = image.values
        low, high = values.min((0, 1)).tolist(), values.max((0, 1)).tolist()
        self._extend(PixelFormat(values.shape[2], 8 * values.dtype.itemsize), low, high)
        return bool(low == high)

    def _extend(self, pixels: PixelFormat, low: list[int], high: list[int]) -> None:
        if self.pixels is not None:
            low = [min(pair) for pair in zip(self.low, low, strict=True)]
            high = [max(pair) for pair in zip(self.high, high, strict=True)]
        self.pixels, self.low, self.high = pixels, low, high

    def dump_counts(self) -> dict[str, Any]:
        """Returns the counts as JSON, for `merge_counts`; {} without an image."""
        return {} if self.pixels is None else {**self.pixels.dump(), "low": self.low, "high": self.high}

    def merge_counts(self, raw: Mapping[str, Any]) -> None:
        """Adds the counts that another object dumped."""
        if (pixels := parse_pixel_format(raw or None)) is not None:
            self._extend(pixels, list(raw["low"]), list(raw["high"]))


def describe_channels(images: Mapping[str, Any]) -> list[str]:
    """Returns lines about each channel of a manifest's entry `images`; none where images became RGB of 8 bits."""
    raw = images.get("pixels")
    pixels = parse_pixel_format(raw)
    if raw is None or pixels is None:
        return []
    sums = ColourSums()
    sums.merge_sums(images["colours"])
    mean, std = sums.compute_colours(pixels.white)
    levels = [
        f"{k + 1}: levels {low:,} to {high:,}, mean {centre * pixels.white:,.1f} ± {spread * pixels.white:,.1f}"
        for k, (low, high, centre, spread) in enumerate(zip(raw["low"], raw["high"], mean, std, strict=True))
    ]
    more = len(levels) - MAX_LISTED_CHANNELS
    return [
        f"{pixels}, as they are in the files (dataset.channels); means of the training images",
        *(f"channel {line}" for line in levels[:MAX_LISTED_CHANNELS]),
        *([f"and {more:,} more channels"] if more > 0 else []),
    ]

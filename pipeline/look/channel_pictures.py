"""Pictures of images with their channels as they are (`dataset.channels`): which levels of which channels are shown."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.channels.resampling import resample_box
from firstlight.tasks.visuals import SHOWN_CHANNELS, SHOWN_QUANTILES, describe_shown

# The largest number of pixels of each image that the range of levels is taken of.
MAX_RANGE_PIXELS = 4096


@dataclass(frozen=True)
class ShownLevels:
    """The channels that pictures show, one as grey or three as colours, and their (k,) levels of black and white."""

    pixels: PixelFormat
    channels: tuple[int, ...]
    black: np.ndarray
    white: np.ndarray

    def describe(self) -> str:
        """Returns what a caption says of the pictures; "" where they show the levels as they are."""
        if self.pixels.channels not in (1, SHOWN_CHANNELS):
            return describe_shown(self.pixels.channels).removeprefix("; ")
        return "levels from their 2nd to their 98th percentile" if self.pixels.bits > 8 else ""

    def draw(self, encoded: bytes, side: int) -> Image.Image:
        """Returns the picture of an image, at most `side` pixels wide and high."""
        values = np.ascontiguousarray(open_channels(encoded, self.pixels).values[:, :, self.channels])
        height, width = values.shape[:2]
        share = min(side / max(width, height), 1.0)
        small = resample_box(
            values,
            (0.0, 0.0, float(width), float(height)),
            max(round(width * share), 1),
            max(round(height * share), 1),
            self.pixels.white,
        )
        shares = (small.astype(np.float64) - self.black) / np.maximum(self.white - self.black, 1e-9)
        shown = np.rint(255.0 * shares.clip(0.0, 1.0)).astype(np.uint8)
        return Image.fromarray(shown[:, :, 0] if len(self.channels) == 1 else shown)


def measure_shown_levels(pixels: PixelFormat, images: Sequence[bytes]) -> ShownLevels:
    """Returns the levels that pictures of such images show, by some of them.

    Images are shown as by `tasks.visuals.show_channels`: one channel as grey, three as colours, and the first three of
    others, each from its 2nd to its 98th percentile. One and three channels of 16 bits are shown from their percentiles
    too, as data of 12 bits would be black; three have one range, so that colours stay.
    """
    count = pixels.channels
    channels = (0,) if count == 1 else tuple(min(k, count - 1) for k in range(SHOWN_CHANNELS))
    if pixels.bits == 8 and count in (1, SHOWN_CHANNELS):
        return ShownLevels(pixels, channels, np.zeros(len(channels)), np.full(len(channels), float(pixels.white)))
    sampled = []
    for encoded in images:
        values = open_channels(encoded, pixels).values[:, :, channels].reshape(-1, len(channels))
        sampled.append(values[:: -(-len(values) // MAX_RANGE_PIXELS)])
    black, white = np.quantile(np.concatenate(sampled), SHOWN_QUANTILES, axis=0)
    if count == SHOWN_CHANNELS:
        black, white = np.full_like(black, black.min()), np.full_like(white, white.max())
    return ShownLevels(pixels, channels, black, white)

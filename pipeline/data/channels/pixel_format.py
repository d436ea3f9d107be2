"""The format of the pixels of a data set: the number of channels, and the bits of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# The types of pixels by the bits of a channel.
PIXEL_DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
MAX_CHANNELS = 512


@dataclass(frozen=True)
class PixelFormat:
    """The format of all pixels of a store, in memory and on the way to the network."""

    channels: int = 3
    bits: int = 8

    def __str__(self) -> str:
        plural = "" if self.channels == 1 else "s"
        return f"{self.channels} channel{plural} of {self.bits} bits"

    @property
    def dtype(self) -> np.dtype:
        """The unsigned integers that hold a channel."""
        return PIXEL_DTYPES[self.bits]

    @property
    def white(self) -> int:
        """The highest level, which a network sees as 1."""
        return int(2**self.bits - 1)

    @property
    def pixel_bytes(self) -> int:
        """The bytes of a pixel."""
        return self.channels * self.bits // 8

    def dump(self) -> dict[str, int]:
        """Returns the format as JSON, for `parse_pixel_format`."""
        return {"channels": self.channels, "bits": self.bits}


@dataclass(frozen=True)
class FileFormat:
    """The format of the pixels that a file itself has."""

    pixels: PixelFormat
    # Upright width and height.
    size: tuple[int, int]
    # Pages of TIFF or frames of DICOM, whose channels count together.
    parts: int = 1

    @property
    def is_stack(self) -> bool:
        """True if the file has several grey pages or frames."""
        return self.parts > 1 and self.pixels.channels == self.parts


# The format that every image gets if a data set states no channels.
RGB_PIXELS = PixelFormat()


def parse_pixel_format(raw: Mapping[str, Any] | None) -> PixelFormat | None:
    """Returns the format that `PixelFormat.dump` has written; None for None."""
    return None if raw is None else PixelFormat(int(raw["channels"]), int(raw["bits"]))


def state_pixel_format(channels: int | None, bits: int | None) -> PixelFormat | None:
    """Returns the format of `dataset.channels` and `dataset.bits`; None if images become RGB of 8 bits."""
    return None if channels is None else PixelFormat(channels, bits or 8)


def limit_pixel_format(channels: int, bits: int) -> PixelFormat:
    """Returns the format that a data set can state which is nearest to that of a file."""
    return PixelFormat(min(max(channels, 1), MAX_CHANNELS), bits if bits in PIXEL_DTYPES else max(PIXEL_DTYPES))


def describe_pixel_format(channels: int, bits: int) -> str:
    """Returns the words for a format that may be none of `PixelFormat`, as that of a file."""
    return str(PixelFormat(channels, bits))

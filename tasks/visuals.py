"""Figures that a pretraining method asks for: grids of images, and plots of logged metrics."""

from dataclasses import dataclass

import torch
from torch import Tensor

# The channels that are shown as red, green and blue if an image has no colours, each scaled between two quantiles.
SHOWN_CHANNELS = 3
SHOWN_QUANTILES = (0.02, 0.98)
# The largest number of values that a quantile is taken of.
MAX_QUANTILE_VALUES = 1 << 20


@dataclass(frozen=True)
class ImageRow:
    """A row of a grid: images side by side, the same image in a column of all rows."""

    caption: str
    # (B, C, H, W) in 0..1; other channels than one or three are drawn as `show_channels` shows them.
    images: Tensor
    # (B, h, w) in 0..1, drawn as heat over the images.
    maps: Tensor | None = None
    # True if the grid also gets the row of the network before its first step.
    untrained: bool = False


@dataclass(frozen=True)
class ImageGrid:
    """Rows of images under one title. `name` is the name of the file."""

    name: str
    title: str
    rows: tuple[ImageRow, ...]


@dataclass(frozen=True)
class Plot:
    """Logged metrics in one figure, with a point for every `every` epochs: the last value that was logged in them."""

    # The name of the file.
    name: str
    title: str
    # The names of the metrics.
    numbers: tuple[str, ...]
    every: int
    # The name of `every` epochs, e.g. "round".
    unit: str


def show_channels(images: Tensor) -> Tensor:
    """Returns (B, C, H, W) images in 0..1 as (B, 3, H, W): colours as they are, one channel as grey.

    Images of other numbers of channels are shown by the first three, each scaled between its 2nd and its 98th
    percentile over all images, since bands have no common range; the second of two is shown twice.
    """
    count = images.shape[1]
    if count in (1, SHOWN_CHANNELS):
        return images.expand(-1, SHOWN_CHANNELS, -1, -1)
    chosen = images[:, [min(k, count - 1) for k in range(SHOWN_CHANNELS)]].float()
    values = chosen.transpose(0, 1).flatten(1)
    values = values[:, :: -(-values.shape[1] // MAX_QUANTILE_VALUES)]
    low, high = values.quantile(torch.tensor(SHOWN_QUANTILES, device=values.device), 1)[:, None, :, None, None]
    shown: Tensor = ((chosen - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)
    return shown


def describe_shown(channels: int) -> str:
    """Returns what a caption says of `show_channels`; "" where images are shown as they are."""
    if channels in (1, SHOWN_CHANNELS):
        return ""
    return f"; channels 1 to {min(channels, SHOWN_CHANNELS)} of {channels}, each from its 2nd to its 98th percentile"


def stretch_contrast(maps: Tensor) -> Tensor:
    """Scales each of (B, h, w) maps to 0..1, from its smallest to its largest value. A constant map becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)

"""Figures that a pretraining method asks for: grids of images, and plots of logged metrics."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageRow:
    """A row of a grid: images side by side, the same image in a column of all rows."""

    caption: str
    # (B, 3, H, W) in 0..1.
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


def stretch_contrast(maps: Tensor) -> Tensor:
    """Scales each of (B, h, w) maps to 0..1, from its smallest to its largest value. A constant map becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)

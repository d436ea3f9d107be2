"""What a pretraining method has to show for itself: pictures of held-out images, and curves of what it logs."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """Images side by side, the same one in a column of all rows; where there are `maps`, each is drawn as heat over its image."""

    caption: str
    images: Tensor  # (B, 3, H, W) in 0..1
    maps: Tensor | None = None  # (B, h, w) in 0..1
    untrained: bool = False  # also shown as the network had it before its first step


@dataclass(frozen=True)
class Picture:
    """Rows of images under one title. `name`: of its file."""

    name: str
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Curve:
    """Logged numbers in one figure, of each the last value that was logged in every `every` epochs. `unit`: what those epochs are called."""

    name: str
    title: str
    numbers: tuple[str, ...]
    every: int
    unit: str


def stretched(maps: Tensor) -> Tensor:
    """(B, h, w) -> 0..1, each map from its own least to its own largest value; 0 where a map has one value only."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)

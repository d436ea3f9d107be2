"""Sliding windows: proposals for Fast R-CNN without a network or external files (Girshick 2015, section 5.5)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

# The ratios of the height to the width of a window.
WINDOW_RATIOS = (0.5, 1.0, 2.0)


class SlidingWindows(nn.Module):
    """Replaces a region proposal network by the same windows over every image, in steps of a quarter of their side."""

    def __init__(self, sides: tuple[int, ...]) -> None:
        super().__init__()
        self.sides = sides

    def forward(
        self, images: "ImageList", features: Mapping[str, Tensor], targets: Any = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        proposals = sliding_windows(images.tensors.shape[-1], self.sides).to(images.tensors.device)
        return [proposals] * len(images.image_sizes), {}


def sliding_windows(size: int, sides: tuple[int, ...]) -> Tensor:
    """Returns (n, 4) boxes of an image of `size` x `size`, with evenly spaced centres.

    Each of `sides` has boxes of its area (side squared) and of three shapes.
    """
    boxes = []
    for side in sides:
        count = max(1, round(4 * size / side))
        centres = (torch.arange(count) + 0.5) * size / count
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        for ratio in WINDOW_RATIOS:
            half_width, half_height = side / ratio**0.5 / 2, side * ratio**0.5 / 2
            boxes.append(
                torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), -1).view(-1, 4)
            )
    return torch.cat(boxes).clamp(0, size)

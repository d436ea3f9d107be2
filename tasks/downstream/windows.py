"""Windows that slide over an image: proposals for Fast R-CNN that need neither a network nor files from elsewhere (Girshick 2015, section 5.5)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

RATIOS = (0.5, 1.0, 2.0)  # of the height to the width of a window


class Windows(nn.Module):
    """In the place of a region proposal network: the same windows over every image, in steps of a quarter of their side."""

    def __init__(self, sides: tuple[int, ...]) -> None:
        super().__init__()
        self.sides = sides

    def forward(
        self, images: "ImageList", features: Mapping[str, Tensor], targets: Any = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        proposals = windows(images.tensors.shape[-1], self.sides).to(images.tensors.device)
        return [proposals] * len(images.image_sizes), {}


def windows(size: int, sides: tuple[int, ...]) -> Tensor:
    """(n, 4) boxes of an image of `size` x `size`: of the area of each of `sides` squared and of three shapes, their centres evenly apart."""
    boxes = []
    for side in sides:
        count = max(1, round(4 * size / side))
        centres = (torch.arange(count) + 0.5) * size / count
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        for ratio in RATIOS:
            half_width, half_height = side / ratio**0.5 / 2, side * ratio**0.5 / 2
            boxes.append(
                torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), -1).view(-1, 4)
            )
    return torch.cat(boxes).clamp(0, size)

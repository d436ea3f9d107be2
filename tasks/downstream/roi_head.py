"""The parts of a detector that look into a box: pooling of the map, two hidden layers, and their first weights."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.nn.weight_init import Init, initialize_weights

# The layer that gives the boxes is drawn from N(0, 0.001^2), the others from N(0, 0.01^2) (Girshick 2015, section 2.3).
BOX_LAYER_STD = 0.001


class RoiMaxPooling(nn.Module):
    """Max-pools a map in boxes, whose edges are rounded to whole positions of the map (Girshick 2015, section 2.1)."""

    def __init__(self, level: str, size: int) -> None:
        super().__init__()
        self.level, self.size = level, size

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Returns (n, C, `size`, `size`) for the n boxes (k, 4) of all images, in pixels of the images."""
        from torchvision.ops import roi_pool

        map_ = maps[self.level]
        # The distance of two positions in pixels is a power of two; convolutions that lose an edge make it seem larger.
        scale = 2.0 ** round(math.log2(map_.shape[-1] / image_shapes[0][1]))
        # The operation takes one type of numbers.
        return roi_pool(map_, [b.to(map_.dtype) for b in boxes], self.size, scale)  # type: ignore[no-any-return]


def build_roi_pooling(levels: list[str], kind: Literal["align", "max"], size: int) -> nn.Module:
    """Returns the pooling of the maps `levels` in boxes, as torchvision's detectors take it."""
    from torchvision.ops import MultiScaleRoIAlign

    if kind == "max":
        return RoiMaxPooling(levels[-1], size)
    align: nn.Module = MultiScaleRoIAlign(levels, output_size=size, sampling_ratio=2)
    return align


class BoxHead(nn.Module):
    """Two hidden layers with ReLU, (n, C, h, w) -> (n, hidden): fc6 and fc7, with dropout after each as in CaffeNet."""

    def __init__(self, size: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc6, self.fc7 = nn.Linear(size, hidden), nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc6(pooled.flatten(1))))
        return self.dropout(F.relu(self.fc7(x)))  # type: ignore[no-any-return]


def draw_head_weights(parts: Iterable[nn.Module], predictor: nn.Module, init: Init) -> None:
    """Draws the weights of all `parts` of a detector, among them the layers of `predictor`."""
    for part in parts:
        initialize_weights(part, init)
    if init == "gaussian":
        nn.init.normal_(predictor.bbox_pred.weight, std=BOX_LAYER_STD)  # type: ignore[arg-type, union-attr]

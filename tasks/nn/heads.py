"""Fully connected heads."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import pooled
from firstlight.tasks.nn.norms import Norm, norm_layer


def mlp(size: int, hidden: tuple[int, ...], out: int, *, dropout: float, norm: Norm) -> nn.Sequential:
    """(B, size) -> (B, out). Per hidden layer Linear, norm, ReLU, and dropout after the first (NAT's code); then Linear. () is linear."""
    layers: list[nn.Module] = []
    for depth, width in enumerate(hidden):
        layers += [nn.Linear(size, width, bias=False), norm_layer(norm, width), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if depth == 0 and dropout else []
        size = width
    return nn.Sequential(*layers, nn.Linear(size, out))


class Projection(nn.Module):
    """The head that a method learns on the deepest map: feature maps -> (B, out) on the unit sphere, in float32 or wider.

    `size`: of the pooled map. `spec`: plain values for JSON; `Projection(**spec)` is the same network with fresh weights.
    """

    def __init__(self, size: int, hidden: Sequence[int], out: int, *, dropout: float, norm: Norm, pool: str) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            "size": size,
            "hidden": list(hidden),
            "out": out,
            "dropout": dropout,
            "norm": norm,
            "pool": pool,
        }
        self.pool = pool
        self.layers = mlp(size, tuple(hidden), out, dropout=dropout, norm=norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        projected = self.layers(pooled(maps, self.pool))
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=1)

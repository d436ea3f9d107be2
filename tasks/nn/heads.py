"""Fully connected heads."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.nn.feature_maps import pool_maps
from firstlight.tasks.nn.norms import Norm, norm_layer

HeadNorm = Norm | Literal["none"]
# The hidden layers that dropout follows: `first` in NAT's code (alexnet.lua), `all` in AlexNet (Krizhevsky et al. 2012,
# section 4.2) and VGG (Simonyan and Zisserman 2015, section 3.1).
DropoutLayers = Literal["first", "all"]


def build_mlp(
    size: int,
    hidden: tuple[int, ...],
    out: int,
    *,
    dropout: float,
    norm: HeadNorm,
    dropout_layers: DropoutLayers = "first",
) -> nn.Sequential:
    """Returns a perceptron (B, size) -> (B, out).

    Each hidden layer is Linear, norm, ReLU, and dropout where `dropout_layers` has it. Without hidden layers it is
    linear. A hidden layer that is normalised has no bias: the normalisation would take it away.
    """
    layers: list[nn.Module] = []
    for depth, width in enumerate(hidden):
        layers += [nn.Linear(size, width, bias=norm == "none")]
        layers += [norm_layer(norm, width)] if norm != "none" else []
        layers += [nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout and (depth == 0 or dropout_layers == "all") else []
        size = width
    return nn.Sequential(*layers, nn.Linear(size, out))


class Projection(nn.Module):
    """The projection head of a method: feature maps -> (B, out) unit vectors of the deepest map, in float32 or wider.

    The attribute `spec` holds plain values for JSON: `Projection(**spec)` is the same network with new weights.

    Args:
        size: the size of the pooled map.
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
        self.layers = build_mlp(size, tuple(hidden), out, dropout=dropout, norm=norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        projected = self.layers(pool_maps(maps, self.pool))
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=1)

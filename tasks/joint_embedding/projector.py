"""The projector between an encoder and a loss that compares views, and its pooling."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.norms import Norm, norm_layer

ProjectorPooling = Literal["avg", "cls", "cls_avg"]


def choose_pooling(encoder: Encoder, pool: ProjectorPooling | None) -> ProjectorPooling:
    """Returns `pool`; for None `cls` if the encoder has a class token, otherwise `avg`.

    Raises:
        ValueError: the pooling needs a class token, and the encoder has none; the message starts with `pool`.
    """
    chosen: ProjectorPooling = pool or ("cls" if encoder.has_class_token else "avg")
    pooled_size(encoder, chosen)
    return chosen


class Projector(nn.Module):
    """A perceptron (B, size) -> (B, out), in float32 or wider.

    Each hidden layer is Linear, norm, ReLU. No layer has a bias of its own: a normalisation, or the loss, would take it
    away.

    Args:
        size: the number of features.
        hidden: the widths of the hidden layers.
        out: the width of the last layer.
        norm: the normalisation of the hidden layers.
        last_norm: True normalises what the last layer gives, too.

    Raises:
        ValueError: the norm would make every value of a layer a group, and all its results equal.
    """

    def __init__(self, size: int, hidden: Sequence[int], out: int, *, norm: Norm, last_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(size, width, bias=False), _normalise_vectors(norm, width), nn.ReLU()]
            size = width
        layers.append(nn.Linear(size, out, bias=False))
        if last_norm:
            layers.append(_normalise_vectors(norm, out))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.layers(features)
        return projected.to(torch.promote_types(projected.dtype, torch.float32))


def _normalise_vectors(norm: Norm, width: int) -> nn.Module:
    layer = norm_layer(norm, width)
    if isinstance(layer, nn.GroupNorm) and layer.num_groups == width:
        raise ValueError(
            f"norm: {norm!r} is not valid for a layer as wide as {width}, each value of which would be a group; valid: "
            "batch, sync"
        )
    return layer

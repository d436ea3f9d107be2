"""A head that assigns features to prototypes (DINO, Caron et al. 2021, section 3.2 and appendix C)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.nn.heads import HeadNorm
from firstlight.tasks.nn.norms import norm_layer

# The standard deviation of the first weights of the perceptron (authors' code, as in ViTs).
INITIAL_STD = 0.02


class PrototypeLayer(nn.Module):
    """A linear layer without bias, (..., size) -> (..., prototypes), whose rows have a length of their own.

    Row k is scale_k direction_k / |direction_k| (weight normalisation, Salimans and Kingma 2016).

    Args:
        learn_lengths: True trains the scales, which begin with 1; False keeps them there.
    """

    def __init__(self, size: int, prototypes: int, learn_lengths: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(prototypes, size))
        nn.init.kaiming_uniform_(self.direction, a=5**0.5)
        self.scale = nn.Parameter(torch.ones(prototypes)) if learn_lengths else None
        # True gives all parameters a gradient of exactly zero.
        self.is_frozen = False

    def forward(self, x: Tensor) -> Tensor:
        # A gradient of zero, and not none: DistributedDataParallel waits for one of every parameter.
        direction = self.direction.detach() + 0.0 * self.direction if self.is_frozen else self.direction
        logits = F.linear(x, F.normalize(direction, dim=1).to(x.dtype))
        if self.scale is None:
            return logits
        return logits * (self.scale.detach() + 0.0 * self.scale if self.is_frozen else self.scale)


class PrototypeHead(nn.Module):
    """A perceptron with GELU, a bottleneck of unit length, and prototypes: (B, size) -> (B, prototypes) logits.

    The logits are in float32 or wider. With `learn_lengths` off they are cosines.

    Args:
        size: the number of features.
        hidden: the widths of the hidden layers.
        bottleneck: the number of features that are compared with the prototypes.
        norm: the normalisation of the hidden layers, which then have no bias.
        learn_lengths: see `PrototypeLayer`.
    """

    def __init__(
        self,
        size: int,
        hidden: Sequence[int],
        bottleneck: int,
        prototypes: int,
        *,
        norm: HeadNorm = "none",
        learn_lengths: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(size, width, bias=norm == "none")]
            layers += [norm_layer(norm, width)] if norm != "none" else []
            layers += [nn.GELU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, bottleneck))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=INITIAL_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = PrototypeLayer(bottleneck, prototypes, learn_lengths)

    def forward(self, features: Tensor) -> Tensor:
        squeezed = self.layers(features)
        squeezed = squeezed.to(torch.promote_types(squeezed.dtype, torch.float32))
        logits: Tensor = self.prototypes(F.normalize(squeezed, dim=-1))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

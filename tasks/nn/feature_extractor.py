"""The features of an image that are looked at: of any map of the encoder, or of the head that was pretrained on it."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.heads import Projection

Pool = Literal["avg", "grid"]
LARGEST = 10_000  # dimensions of a pooled map, at most


def places(channels: int, side: int, pool: Pool) -> int:
    """The side of the grid that a (channels, side, side) map is averaged to.

    avg: 1. grid: the largest with at most 10,000 features, the protocol of linear classifiers on convolutional layers (Zhang et al. 2016,
    arXiv 1603.08511, section 3.2: about 9,000).
    """
    return 1 if pool == "avg" else max([g for g in range(1, side + 1) if channels * g * g <= LARGEST], default=1)


def flat(map_: Tensor, pool: Pool) -> Tensor:
    """(B, C, h, w) -> (B, C * g * g), averaged to a grid of g x g places."""
    return F.adaptive_avg_pool2d(map_, places(map_.shape[1], min(map_.shape[2:]), pool)).flatten(1)


class Features(nn.Module):
    """(B, 3, H, W) in 0..1 -> (B, d) float32 features, one tensor for each of `layers`.

    `layers` are indices of the encoder's maps, -1 the deepest. With a `head` there is one tensor, of its unit vectors, and `layers` is not looked at.
    """

    def __init__(self, encoder: Encoder, head: Projection | None, layers: Sequence[int], pool: Pool) -> None:
        super().__init__()
        self.encoder, self.head, self.pool = encoder, head, pool
        self.layers = [layer % len(encoder.shapes) for layer in layers]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.head is not None:
            return (self.head(self.encoder(images)).float(),)
        maps = self.encoder(images, max(self.layers) + 1)
        return tuple(flat(maps[layer], self.pool).float() for layer in self.layers)

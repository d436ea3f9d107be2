"""Features of images: vectors of any map of the encoder, or of the head that was pretrained on it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.nn import Pool
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.feature_maps import MapList, pool_maps
from firstlight.tasks.nn.heads import Projection

# The largest number of features of a map that is averaged to a grid.
MAX_GRID_FEATURES = 10_000


def grid_side(channels: int, side: int, pool: Pool) -> int:
    """Returns the side of the grid that a (channels, side, side) map is averaged to.

    It is 1 for avg. For grid it is the largest with at most 10,000 features, the protocol of linear classifiers on
    convolutional layers (Zhang et al. 2016, arXiv 1603.08511, section 3.2: about 9,000).
    """
    return (
        max([g for g in range(1, side + 1) if channels * g * g <= MAX_GRID_FEATURES], default=1)
        if pool == "grid"
        else 1
    )


def flatten_map(map_: Tensor, pool: Pool) -> Tensor:
    """Averages (B, C, h, w) maps to a grid of g x g positions. Returns (B, C * g * g)."""
    return F.adaptive_avg_pool2d(map_, grid_side(map_.shape[1], min(map_.shape[2:]), pool)).flatten(1)


class FeatureExtractor(nn.Module):
    """Computes (B, d) float32 features of (B, C, H, W) images in 0..1, one tensor for each of `layers`.

    Args:
        head: gives one tensor of unit vectors instead; `layers` is ignored then.
        layers: indices of the encoder's maps, -1 is the deepest.
        pool: `avg` or `grid`, the map averaged as a whole or to a grid (`grid_side`); `cls` or `cls_avg`, the class
            token of the map's layer, alone or before the average.
        autocast: the number format that the encoder computes in where it can (automatic mixed precision); None:
            float32, as the head and the averages.

    Raises:
        ValueError: the encoder has no class token, and `pool` needs one.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: Projection | None,
        layers: Sequence[int],
        pool: Pool,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pool in ("cls", "cls_avg"):
            pooled_size(encoder, pool)
        self.encoder, self.head, self.pool, self.autocast = encoder, head, pool, autocast
        self.layers = [layer % len(encoder.shapes) for layer in layers]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        depth = None if self.head is not None else max(self.layers) + 1
        with torch.autocast(images.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            maps = self.encoder(images, depth)
        if self.head is not None:
            return (self.head(_take_layer(maps, -1)),)
        return tuple(self._pool_map(_take_layer(maps, layer)) for layer in self.layers)

    def _pool_map(self, taken: MapList) -> Tensor:
        if self.pool in ("cls", "cls_avg"):
            return pool_maps(taken, self.pool)
        return flatten_map(taken[-1], self.pool)


def _take_layer(maps: MapList, layer: int) -> MapList:
    """Returns one map, with its class token, in float32."""
    tokens = maps.class_tokens
    return MapList([maps[layer].float()], None if tokens is None else [tokens[layer].float()])

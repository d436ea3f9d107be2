"""Views of several sizes through an encoder."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from firstlight.tasks.nn.encoders import Encoder, pool_maps
from firstlight.tasks.self_distillation.patch_masks import replace_patches


class EmbeddedView(NamedTuple):
    """Features that an encoder gives for a view."""

    # (B, C) features.
    pooled: Tensor
    # (B, C, h, w), the deepest map.
    map: Tensor


def embed_views(
    encoder: Encoder, views: Sequence[Tensor], pool: str, replacement: tuple[Sequence[Tensor], Tensor] | None = None
) -> list[EmbeddedView]:
    """Returns what the encoder gives for each view. Neighbouring views of one size pass it as one batch.

    Args:
        encoder: the network.
        views: (B, 3, S, S) images, S by view.
        pool: the pooling of the deepest map.
        replacement: the (B, h, w) mask of each view, and the (C,) token that stands in place of masked patches.
    """
    found: list[EmbeddedView] = []
    for _, group in groupby(range(len(views)), key=lambda view: views[view].shape[-1]):
        same = list(group)
        hidden = replacement and replace_patches(
            encoder, torch.cat([replacement[0][view] for view in same]), replacement[1]
        )
        with hidden or nullcontext():
            maps = encoder(torch.cat([views[view] for view in same]))
        pairs = zip(pool_maps(maps, pool).chunk(len(same)), maps[-1].chunk(len(same)), strict=True)
        found += [EmbeddedView(pooled, map_) for pooled, map_ in pairs]
    return found

"""The feature maps that an encoder gives, with their class tokens, and vectors of them."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

# The ways in which a map becomes a vector of each image.
MapPooling = Literal["avg", "flatten", "cls", "cls_avg"]


class MapList(list[Tensor]):
    """The (B, C, h, w) feature maps of images, shallow to deep: a list, with the class tokens beside it.

    `class_tokens`: the (B, C) class token of each map, from the same layer; None if the network has none. Slices and
    copies of the list are plain lists, without them.
    """

    def __init__(self, maps: Iterable[Tensor], class_tokens: Sequence[Tensor] | None = None) -> None:
        super().__init__(maps)
        self.class_tokens = None if class_tokens is None else list(class_tokens)


def join_channels(first: MapList, second: MapList) -> MapList:
    """Concatenates the maps of two networks along their channels, and their class tokens."""
    tokens = None
    if first.class_tokens is not None and second.class_tokens is not None:
        tokens = [torch.cat(pair, 1) for pair in zip(first.class_tokens, second.class_tokens, strict=True)]
    return MapList((torch.cat(pair, 1) for pair in zip(first, second, strict=True)), tokens)


def pool_maps(maps: Sequence[Tensor], pool: str, layer: int = -1) -> Tensor:
    """Returns a map as vectors; by default the deepest.

    They are for `avg` (B, C), averaged over positions; for `flatten` (B, C * h * w); for `cls` (B, C), the class token
    of the map's layer; for `cls_avg` (B, 2 C), the class token before the average (Oquab et al. 2023, DINOv2, section
    7.1, evaluate such vectors).

    Raises:
        ValueError: the class token is asked for, and the network has none.
    """
    if pool == "flatten":
        return maps[layer].flatten(1)
    if pool == "avg":
        return maps[layer].mean((2, 3))
    tokens = maps.class_tokens if isinstance(maps, MapList) else None
    if tokens is None:
        raise ValueError(f"pool: {pool!r} needs a class token, and the encoder has none; valid: avg, flatten")
    return tokens[layer] if pool == "cls" else torch.cat((tokens[layer], maps[layer].mean((2, 3))), 1)

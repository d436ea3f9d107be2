"""Masks of a ViT's patches, drawn by key, and a forward pass that does not see the masked patches."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.counter_rng import draw_uniform
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.timm_backbones import TokenMaps

# Blocks that are tried for a mask at most, and without success in a row. A draw has four numbers for each.
MASK_TRIES = 64
MASK_FAILURES = 10
# A block's height over its width is between this and its inverse (BEiT, section 2.2).
LEAST_ASPECT = 0.3


def draw_block_masks(key: Tensor, rows: int, columns: int, probability: float, ratio: tuple[float, float]) -> Tensor:
    """Returns (B, rows, columns) bool masks for (B,) keys: blocks that cover a share of the patches.

    A mask is empty with 1 - `probability`; otherwise its share is uniform within `ratio`, and is not exceeded. Blocks
    are added until it is reached, or until MASK_FAILURES in a row do not fit. Sources: BEiT (Bao et al. 2021),
    algorithm 1; iBOT's code.
    """
    drawn = draw_uniform(key, 2 + 4 * MASK_TRIES).double()
    low, high = ratio
    wanted = (low + (high - low) * drawn[:, 1]) * rows * columns
    active = drawn[:, 0] < probability
    down, across = torch.arange(rows, device=key.device)[:, None], torch.arange(columns, device=key.device)
    mask = torch.zeros(len(key), rows, columns, dtype=torch.bool, device=key.device)
    failures = torch.zeros(len(key), dtype=torch.int64, device=key.device)
    least = (min(rows, columns) // 3) ** 2
    for u in drawn[:, 2:].unflatten(1, (MASK_TRIES, 4)).unbind(1):
        left = wanted - mask.sum((1, 2))
        area = least + (left - least) * u[:, 0]
        aspect = torch.exp((2.0 * u[:, 1] - 1.0) * math.log(LEAST_ASPECT))
        height, width = (area * aspect).clamp_min(0.0).sqrt().round(), (area / aspect).clamp_min(0.0).sqrt().round()
        top = (u[:, 2] * (rows - height + 1)).floor()[:, None, None]
        start = (u[:, 3] * (columns - width + 1)).floor()[:, None, None]
        block = (down >= top) & (down < top + height[:, None, None])
        block = block & (across >= start) & (across < start + width[:, None, None])
        added = (block & ~mask).sum((1, 2))
        # A whole row or column is never a block (authors' code).
        fits = (height < rows) & (width < columns) & (added > 0) & (added <= left)
        tried = active & (left > 0) & (failures < MASK_FAILURES)
        mask = mask | (block & (tried & fits)[:, None, None])
        failures = torch.where(fits, 0, failures + 1)
    return mask


def is_maskable(encoder: Encoder) -> bool:
    """Returns True if the patches of an encoder's images can be masked: it is a ViT of one tower."""
    stages = encoder.stages
    is_vit = isinstance(stages, TokenMaps) and isinstance(getattr(stages.model, "patch_embed", None), nn.Module)
    return is_vit and encoder.has_class_token and encoder.twin is None


def choose_patches(masks: Sequence[Tensor], most: float) -> tuple[list[Tensor], Tensor]:
    """Returns the patches that enter the patch loss, as many of every image, with all masked ones among them.

    They are the (B, P_v) places of each view, and the (B, P) weights of all views' patches, with P the sum of the P_v:
    1 / (the masked patches of the view) / (the views) for masked patches, and 0 for others.

    Args:
        masks: the (B, h, w) bool mask of each view.
        most: the largest share of a view's patches that is masked.
    """
    places, weights = [], []
    for mask in masks:
        flat = mask.flatten(1)
        order = flat.byte().argsort(stable=True, dim=1, descending=True)[:, : max(1, int(most * flat.shape[1]))]
        places.append(order)
        weights.append(flat.gather(1, order).double() / flat.sum(1, keepdim=True).clamp_min(1) / len(masks))
    return places, torch.cat(weights, 1)


def gather_patches(maps: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Returns the (B, P, C) tokens at the (B, P_v) places of each view, out of (B, C, h, w) maps."""
    pairs = zip(maps, places, strict=True)
    return torch.cat([map_.flatten(2).mT.take_along_dim(place[..., None], 1) for map_, place in pairs], 1)


@contextmanager
def replace_patches(encoder: Encoder, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Returns a block in which an encoder has `token` in place of the embeddings of masked patches.

    A compiled encoder runs uncompiled in it: compiled code does not notice the hook, nor another mask in it.

    Args:
        encoder: one for which `is_maskable` holds.
        mask: (B, h, w) bool, of the images that the block embeds.
        token: (C,).
    """

    def replace(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        # (B, h, w, C) if the network takes images of any size, otherwise (B, h * w, C).
        places = mask if embedded.ndim == 4 else mask.flatten(1)
        return torch.where(places[..., None], token.to(embedded.dtype), embedded)

    assert isinstance(encoder.stages, TokenMaps)
    handle = encoder.stages.model.get_submodule("patch_embed").register_forward_hook(replace)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()

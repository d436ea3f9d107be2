"""The attention of a ViT's class token, which DINO shows as object masks (Caron et al. 2021, figure 1)."""

from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.timm_backbones import TokenMaps
from firstlight.tasks.visuals import ImageGrid, ImageRow, stretch_contrast

# The largest number of heads whose attention is drawn.
MAX_SHOWN_HEADS = 6


def find_last_attention(encoder: Encoder) -> nn.Module | None:
    """Returns the self-attention of the last block; None if the encoder has none of timm's plain kind."""
    from timm.layers.attention import Attention

    if not isinstance(encoder.stages, TokenMaps) or not encoder.has_class_token:
        return None
    blocks: Any = getattr(encoder.stages.model, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks else None
    return attention if isinstance(attention, Attention) else None


@torch.no_grad()
def compute_class_attention(encoder: Encoder, images: Tensor) -> Tensor | None:
    """Returns (B, heads, h, w): the share of the class token's attention in the last block that each patch has.

    It is computed from queries and keys, because fused attention gives no weights. Returns None for an encoder without
    a class token or with another kind of attention. (B, 3, H, W) `images` are in 0..1.
    """
    attention: Any = find_last_attention(encoder)
    if attention is None:
        return None
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        map_ = encoder(images)[-1]
    finally:
        handle.remove()
    tokens = seen[0]
    shape = (len(tokens), tokens.shape[1], 3, attention.num_heads, -1)
    queries, keys, _ = attention.qkv(tokens).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    query, keys = attention.q_norm(queries[:, :, :1]), attention.k_norm(keys)
    weights: Tensor = (attention.scale * query @ keys.transpose(2, 3)).softmax(-1)
    rows, columns = map_.shape[2:]
    # Class token and registers are before the patches.
    return weights[:, :, 0, -rows * columns :].reshape(len(images), -1, rows, columns)


def draw_class_attention(encoder: Encoder, images: Tensor, subject: str) -> tuple[ImageGrid, ...]:
    """Returns a grid of (B, 3, H, W) images under the attention of the class token: its mean over heads, and each head.

    Each map is stretched to its own range. Returns () where there is no such attention. `subject`: what the images are.
    """
    attention = compute_class_attention(encoder, images)
    if attention is None:
        return ()
    mean, heads = attention.mean(1), attention.unbind(1)
    rows = [ImageRow("image", images), ImageRow("mean of all heads", images, stretch_contrast(mean), untrained=True)]
    rows += [
        ImageRow(f"head {number}", images, stretch_contrast(weights))
        for number, weights in enumerate(heads[:MAX_SHOWN_HEADS], 1)
        if len(heads) > 1
    ]
    return (ImageGrid("attention", f"attention of the class token in the last block, {subject}", tuple(rows)),)

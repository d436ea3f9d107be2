"""Naive float64 references of MAE: its loss, its patches, fixed positions, and an encoder that sees some patches."""

import math
from typing import Any

import torch
from torch import Tensor


def list_patches(image: Tensor, side: int) -> list[list[float]]:
    """The values of each patch of a (C, H, W) image, patches in row order; in a patch the channel runs fastest."""
    channels, height, width = image.shape
    return [
        [float(image[c, top + y, left + x]) for y in range(side) for x in range(side) for c in range(channels)]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def mae_loss(images: Tensor, predicted: Tensor, masked: Tensor, side: int, normalize: bool) -> float:
    """The mean squared error over the pixels of masked patches (section 3; `forward_loss` of the authors' code).

    Args:
        images: (B, C, H, W), as they enter the encoder.
        predicted: (B, M, P) values for the masked patches.
        masked: (B, M) their numbers.
        side: that of a patch.
        normalize: True subtracts a patch's mean and divides by its standard deviation.
    """
    errors = []
    for image, values, numbers in zip(images, predicted.tolist(), masked.tolist(), strict=True):
        patches = list_patches(image, side)
        for found, number in zip(values, numbers, strict=True):
            wanted = patches[number]
            if normalize:
                mean = math.fsum(wanted) / len(wanted)
                variance = math.fsum((value - mean) ** 2 for value in wanted) / (len(wanted) - 1)
                wanted = [(value - mean) / math.sqrt(variance + 1e-6) for value in wanted]
            errors += [(a - b) ** 2 for a, b in zip(found, wanted, strict=True)]
    return math.fsum(errors) / len(errors)


def masked_psnr(image: Tensor, filled: Tensor, masked: list[int], side: int) -> float:
    """The peak signal-to-noise ratio in dB of the masked patches of a (C, H, W) image in 0..1."""
    true, found = list_patches(image, side), list_patches(filled, side)
    errors = [(a - b) ** 2 for k in masked for a, b in zip(true[k], found[k], strict=True)]
    return -10 * math.log10(math.fsum(errors) / len(errors))


def encode_visible(model: Any, image: Tensor, visible: list[int], side: int) -> Tensor:
    """The tokens that a ViT of timm makes of some patches of a (C, H, W) image, each embedded on its own.

    Returns (prefix + K, C): for networks whose position embeddings include those of prefix tokens.
    """
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    columns = image.shape[2] // side
    prefix = [token[0] for token in (model.cls_token, getattr(model, "dist_token", None)) if token is not None]
    tokens = list(torch.cat(prefix))
    for number in visible:
        top, left = side * (number // columns), side * (number % columns)
        tokens.append((weight * image[:, top : top + side, left : left + side]).sum((1, 2, 3)) + bias)
    places = [*range(len(torch.cat(prefix))), *(len(torch.cat(prefix)) + number for number in visible)]
    x = (torch.stack(tokens) + model.pos_embed[0, places])[None]
    for block in model.blocks:
        x = block(x)
    found: Tensor = model.norm(x)[0]
    return found


def decode_patches(decoder: Any, tokens: Tensor, visible: list[int], wanted: list[int], rows: int) -> Tensor:
    """Returns the (M, P) output of a decoder for the (prefix + K, C) tokens of an image, patch by patch."""
    embedded = decoder.embed(tokens)
    prefix = len(tokens) - len(visible)
    dim = embedded.shape[1]
    sequence = list(embedded[:prefix])
    for number in range(rows**2):
        token = embedded[prefix + visible.index(number)] if number in visible else decoder.mask_token[0, 0]
        sequence.append(token + torch.tensor(position(dim, number // rows, number % rows), dtype=token.dtype))
    x = decoder.norm(decoder.blocks(torch.stack(sequence)[None]))[0, prefix:]
    found: Tensor = decoder.last(x)[wanted]
    return found


def position(dim: int, row: int, column: int) -> list[float]:
    """The fixed embedding of a place: sines and cosines of the column, then those of the row."""
    found = []
    for place in (column, row):
        angles = [place / 10_000 ** (k / (dim / 4)) for k in range(dim // 4)]
        found += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return found

"""Maps of levels of many images at once on any device, bit-identical to Pillow's."""

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.train.device_ops.colors import expand_per_image
from firstlight.tasks.device.copies import send_array


def solarize_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Inverts the levels from the threshold of each image on; none is above 255."""
    rows = np.flatnonzero(drawn[:, 0] <= 255)
    if not len(rows):
        return images
    index = send_array(rows, images.device)
    own = images[index]
    inverted = torch.where(own >= expand_per_image(np.ceil(drawn[rows, 0]).astype(np.uint8), images), 255 - own, own)
    return images.index_copy(0, index, inverted)


def posterize_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Keeps the highest bits of each level: their number for each image is in `drawn`."""
    kept = 256 - 2 ** (8 - drawn[:, 0].astype(np.int64))
    return images & expand_per_image(kept.astype(np.uint8), images)


def equalize_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Equalises the histogram of each channel, as `PIL.ImageOps.equalize`."""
    counts = _count_levels(images)
    is_last = torch.arange(256, device=images.device) == images.flatten(2).amax(2, keepdim=True)
    step = (counts * ~is_last).sum(2, keepdim=True) // 255
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(max=255)
    changed = (step > 0) & expand_per_image(drawn[:, 0] > 0, images)[:, :, 0]
    return _map_levels(images, table, changed)


def stretch_batch(images: Tensor, drawn: np.ndarray, size: int) -> Tensor:
    """Stretches the levels of each channel to 0..255, as `PIL.ImageOps.autocontrast`."""
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    # Rounded once, as there: a number divided by a tensor is multiplied by its rounded reciprocal.
    scale = torch.full_like(low, 255.0) / (high - low).clamp_(min=1.0)
    offset = -low * scale
    table = (torch.arange(256, device=images.device) * scale).add_(offset).trunc_().clamp_(0.0, 255.0)
    changed = (high > low) & expand_per_image(drawn[:, 0] > 0, images)[:, :, 0]
    return _map_levels(images, table, changed)


def _count_levels(images: Tensor) -> Tensor:
    """Counts the levels of (B, 3, H, W) uint8 images. Returns (B, 3, 256) int64."""
    levels = images.flatten(2).long()
    return torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device).scatter_add_(
        2, levels, torch.ones_like(levels)
    )


def _map_levels(images: Tensor, table: Tensor, changed: Tensor) -> Tensor:
    """Maps levels by (B, 3, 256) tables, where the (B, 3, 1) bool `changed` is True."""
    same = torch.arange(256, device=images.device)
    chosen = torch.where(changed, table, same).to(torch.uint8)
    return chosen.gather(2, images.flatten(2).long()).view_as(images)

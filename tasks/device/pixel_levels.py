"""Levels of pixels as tensors: 8 bits are uint8, and 16 bits int16 of the same bits, as torch has no arithmetic of
uint16.

Each becomes a float in 0..1: its share of 255 or 65535. No two levels have the same float32.
"""

import numpy as np
import torch
from torch import Tensor

from firstlight.tasks.device.copies import send_array

# The level of white by type.
WHITE_LEVELS = {torch.uint8: 255, torch.int16: 65535}


def send_pixels(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Returns uint8 or uint16 levels as a uint8 or int16 tensor on the device; a tensor that is there as it is."""
    if isinstance(values, np.ndarray) and values.dtype == np.uint16:
        return send_array(values.view(np.int16), device)
    return send_array(values, device)


def widen_levels(levels: Tensor) -> Tensor:
    """Returns uint8 or int16 levels as int32 in 0..255 or 0..65535."""
    wide = levels.int()
    return wide if levels.dtype == torch.uint8 else wide & 0xFFFF


def narrow_levels(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverts `widen_levels`, to uint8 or int16."""
    is_signed = dtype == torch.int16
    return (torch.where(levels > 0x7FFF, levels - 0x10000, levels) if is_signed else levels).to(dtype)


def scale_pixels(levels: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Converts (B, H, W, C) uint8 or int16 levels to (B, C, H, W) floats in 0..1."""
    shares = levels if levels.dtype == torch.uint8 else widen_levels(levels)
    return shares.permute(0, 3, 1, 2).float().div_(float(WHITE_LEVELS[levels.dtype])).contiguous(memory_format=layout)

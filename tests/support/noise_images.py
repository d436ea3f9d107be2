"""Noise images for tests of augmentations on the device."""

import numpy as np
import torch
from torch import Tensor


def make_noise(count: int, width: int, height: int) -> np.ndarray:
    """(count, H, W, 3): noise, patches of few colours, and single colours."""
    rng = np.random.default_rng(0)
    noise: np.ndarray = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    noise[::3] = noise[::3] // 64 * 64
    noise[1::9] = noise[1::9, :1, :1]
    return noise


def to_batch_of_images(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels).permute(0, 3, 1, 2)

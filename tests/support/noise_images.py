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


def make_extremes(side: int) -> np.ndarray:
    """(11, side, side, 3): black, white, one level, levels that are 1 or 255 apart, few levels, ramps, and noise."""
    rng = np.random.default_rng(side)
    noise = rng.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, side)[:, None, None], (side, side, 3)).astype(np.uint8)
    flat = np.stack([np.full_like(ramp, level) for level in (0, 255, 1, 200)])
    few = np.stack([noise[0] // 128 + 77, noise[1] // 128 * 255, noise[2] // 32 * 32, noise[2] // 4 + 100])
    return np.concatenate((flat, few, ramp[None], ramp[None] // 3 + 90, noise[:1]))


def to_batch_of_images(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels).permute(0, 3, 1, 2)

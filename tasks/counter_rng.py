"""Counter-based random numbers: a function of (seed, pass, image id, stream), drawn for a whole batch on its device.

A generator has a state, so its numbers depend on what was drawn before, and seeding one per image costs more than the
drawing. A counter has none: number k of an image is a hash of (its key, k). The hash is the finaliser of SplitMix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 15), which passes BigCrush on
counters.
"""

import math

import torch
from torch import Tensor

# The constants of SplitMix64 as the signed 64-bit integers that torch has.
GOLDEN_INT64 = 0x9E3779B97F4A7C15 - 2**64
MIX_1_INT64 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2_INT64 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts right logically; torch's shift is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * MIX_1_INT64
    x = (x ^ _shift_right(x, 27)) * MIX_2_INT64
    return x ^ _shift_right(x, 31)


def derive_keys(seed: int, passes: Tensor, ids: Tensor, stream: int) -> Tensor:
    """Returns a (B,) int64 key per image, from (B,) int64 image ids and the pass that each image is in.

    `stream` separates the numbers that one method draws for several purposes.
    """
    key = _mix_int64(torch.full_like(ids, seed) + GOLDEN_INT64)
    for part in (passes, ids, torch.full_like(ids, stream)):
        key = _mix_int64((key ^ part) + GOLDEN_INT64)
    return key


def draw_uniform(key: Tensor, count: int) -> Tensor:
    """Returns (B, count) float32 numbers in [0, 1), multiples of 2**-24, for (B,) keys."""
    numbers = torch.arange(1, count + 1, device=key.device) * GOLDEN_INT64
    return _shift_right(_mix_int64(key[:, None] + numbers), 40).float() * 2.0**-24


def draw_normal(key: Tensor, count: int) -> Tensor:
    """Returns (B, count) float32 standard normal numbers for (B,) keys (Box and Muller 1958)."""
    half = -(-count // 2)
    u = draw_uniform(key, 2 * half)
    radius = (-2.0 * torch.log1p(-u[:, :half])).sqrt()
    angle = 2.0 * math.pi * u[:, half:]
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]

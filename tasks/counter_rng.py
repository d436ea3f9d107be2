"""Random numbers that are a function of (seed, pass, image id, stream) and nothing else, drawn for a whole batch at once on its device.

A generator has a state, so what it draws depends on what was drawn before, and seeding one per image costs more than the drawing. A counter
has none: number k of an image is a hash of (its key, k). The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators", figure 15), which passes BigCrush on counters.
"""

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as the signed 64-bit integers that torch has
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The logical right shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * MIX_1
    x = (x ^ _shifted(x, 27)) * MIX_2
    return x ^ _shifted(x, 31)


def keys(seed: int, passes: Tensor, ids: Tensor, stream: int) -> Tensor:
    """(B,) int64 image ids, and the pass that each is in -> (B,) int64, a key per image.

    `stream` tells apart what one method draws for several purposes.
    """
    key = _mixed(torch.full_like(ids, seed) + GOLDEN)
    for part in (passes, ids, torch.full_like(ids, stream)):
        key = _mixed((key ^ part) + GOLDEN)
    return key


def uniform(key: Tensor, count: int) -> Tensor:
    """(B,) keys -> (B, count) float32 in [0, 1), multiples of 2**-24."""
    numbers = torch.arange(1, count + 1, device=key.device) * GOLDEN
    return _shifted(_mixed(key[:, None] + numbers), 40).float() * 2.0**-24


def normal(key: Tensor, count: int) -> Tensor:
    """(B,) keys -> (B, count) float32 standard normal numbers (Box and Muller 1958)."""
    half = -(-count // 2)
    u = uniform(key, 2 * half)
    radius = (-2.0 * torch.log1p(-u[:, :half])).sqrt()
    angle = 2.0 * math.pi * u[:, half:]
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]

"""Permutations of few rows as a pure function of a key, for many keys at once."""

import numpy as np

from firstlight.pipeline.data.augment.random_numbers import GOLDEN_GAMMA, mix_bits


def derive_order_key(*parts: int) -> int:
    """Returns a key of 64 bits that follows from `parts`, each of 0..2^64-1, and their order."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key ^= np.uint64(part)
        key += GOLDEN_GAMMA
        key = mix_bits(key)
    return int(key[0])


def derive_row_keys(key: int, rows: np.ndarray) -> np.ndarray:
    """Returns a key for each of `rows`, (m,) int64 -> (m,) uint64."""
    return mix_bits(mix_bits(rows.astype(np.uint64) ^ np.uint64(key)) + GOLDEN_GAMMA)


def draw_row_orders(keys: np.ndarray, count: int) -> np.ndarray:
    """Returns a permutation of 0..count-1 for each of the (m,) uint64 keys, (m, count) int64."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_GAMMA
    return np.argsort(mix_bits(keys[:, None] + counters), axis=1, kind="stable")

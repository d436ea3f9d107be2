"""Permutations of few rows as a pure function of a key, for many keys at once."""

import numpy as np

from firstlight.pipeline.data.augment.random_numbers import GOLDEN_GAMMA, draw_bits, fold_keys, mix_bits


def derive_order_key(*parts: int) -> int:
    """Returns a key of 64 bits that follows from `parts`, each of 0..2^64-1, and their order."""
    return int(fold_keys(np.zeros(1, np.uint64), map(np.uint64, parts))[0])


def derive_row_keys(key: int, rows: np.ndarray) -> np.ndarray:
    """Returns a key for each of `rows`, (m,) int64 -> (m,) uint64."""
    return mix_bits(mix_bits(rows.astype(np.uint64) ^ np.uint64(key)) + GOLDEN_GAMMA)


def draw_row_orders(keys: np.ndarray, count: int) -> np.ndarray:
    """Returns a permutation of 0..count-1 for each of the (m,) uint64 keys, (m, count) int64."""
    return np.argsort(draw_bits(keys, 1, count), axis=1, kind="stable")

"""Random numbers as a pure function of (seed, pass, image id, view, op, number), generated for a whole batch by numpy.

A generator with a state would have to be created for each image and view, which costs more than all of its numbers. A
counter has no state: number k of a key is the hash of (key, k). Keys and hash are those of
`firstlight.tasks.counter_rng`, which computes them with torch on any device; decoding tasks import no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

GOLDEN_GAMMA, FIRST_MULTIPLIER, SECOND_MULTIPLIER = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
FIRST_SHIFT, SECOND_SHIFT, THIRD_SHIFT, MANTISSA_SHIFT = (np.uint64(bits) for bits in (30, 27, 31, 11))
# View v uses stream FIRST_VIEW_STREAM + v; lower streams are those of methods.
FIRST_VIEW_STREAM = 1 << 32
# Numbers that are reserved for an op.
NUMBERS_PER_OP = 64


def mix_bits(x: np.ndarray) -> np.ndarray:
    """Applies the finaliser of SplitMix64 to uint64 numbers in place."""
    x ^= x >> FIRST_SHIFT
    x *= FIRST_MULTIPLIER
    x ^= x >> SECOND_SHIFT
    x *= SECOND_MULTIPLIER
    x ^= x >> THIRD_SHIFT
    return x


def derive_view_keys(seed: int, passes: np.ndarray, ids: np.ndarray, view: int) -> np.ndarray:
    """Returns a key for a view of each image, (B,) uint64, from its pass and its id, both (B,) int64."""
    stream = np.uint64(FIRST_VIEW_STREAM + view)
    parts = (np.uint64(0), passes.astype(np.uint64), ids.astype(np.uint64), stream)
    return fold_keys(np.full(len(ids), seed, np.uint64), parts)


def fold_keys(keys: np.ndarray, parts: Iterable[np.ndarray | np.uint64]) -> np.ndarray:
    """Returns keys that follow from `keys`, (m,) uint64, from `parts`, (m,) or () uint64, and their order; in place."""
    for part in parts:
        keys ^= part
        keys += GOLDEN_GAMMA
        keys = mix_bits(keys)
    return keys


def draw_bits(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """Hashes the numbers `first` .. `first` + `count` - 1 of (m,) uint64 keys. Returns (m, count) uint64."""
    counters = np.arange(first, first + count, dtype=np.uint64) * GOLDEN_GAMMA
    return mix_bits(keys[:, None] + counters)


def draw_levels(keys: np.ndarray, count: int, bits: int = 8) -> np.ndarray:
    """Draws for (B,) uint64 keys (B, count) levels of noise of 8 or 16 bits, as unsigned integers of as many: 2**bits
    times the numbers of `tasks.counter_rng.draw_uniform`.
    """
    levels: np.ndarray = (draw_bits(keys, 1, count) >> np.uint64(64 - bits)).astype(f"u{bits // 8}")
    return levels


@dataclass(frozen=True)
class CounterRng:
    """The random numbers of one op, for each image of a batch."""

    # (B,) uint64
    keys: np.ndarray
    # Index in the list of ops.
    op: int

    def uniform(self, count: int) -> np.ndarray:
        """Returns (B, count) float64 in [0, 1), multiples of 2**-53; the same numbers at every call."""
        assert count <= NUMBERS_PER_OP
        numbers: np.ndarray = (draw_bits(self.keys, self.op * NUMBERS_PER_OP + 1, count) >> MANTISSA_SHIFT) * 2.0**-53
        return numbers

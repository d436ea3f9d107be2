"""Random numbers that are a function of (seed, epoch, image id, view, op, number) and nothing else, drawn for a whole batch at once, by numpy.

A generator has a state, and making one per image and view cost more than all that was drawn from it. A counter has none: number k of a key is
the hash of (key, k). Keys and hash are those of `firstlight.tasks.counter_rng`, which has them for torch on any device; decoding tasks import no torch.
"""

from dataclasses import dataclass

import numpy as np

GOLDEN, MIX_1, MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
FIRST, SECOND, THIRD, MANTISSA = (np.uint64(bits) for bits in (30, 27, 31, 11))
AUGMENT = 1 << 32  # the streams from here on are the views: what a method draws for an image is drawn by other keys
PER_OP = 64  # numbers that an op may draw


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, in place."""
    x ^= x >> FIRST
    x *= MIX_1
    x ^= x >> SECOND
    x *= MIX_2
    x ^= x >> THIRD
    return x


def keys(seed: int, epochs: np.ndarray, ids: np.ndarray, view: int) -> np.ndarray:
    """(B,) int64 epochs and image ids -> (B,) uint64, a key for the view of each image."""
    key = np.full(len(ids), seed, np.uint64)
    for part in (np.uint64(0), epochs.astype(np.uint64), ids.astype(np.uint64), np.uint64(AUGMENT + view)):
        key ^= part
        key += GOLDEN
        key = _mixed(key)
    return key


@dataclass(frozen=True)
class Numbers:
    """The random numbers of one op, for each image of a batch."""

    keys: np.ndarray  # (B,) uint64
    op: int  # its place in the list of ops

    def uniform(self, count: int) -> np.ndarray:
        """(B, count) float64 in [0, 1), multiples of 2**-53. The same ones whenever it is called."""
        assert count <= PER_OP
        number = np.arange(self.op * PER_OP + 1, self.op * PER_OP + count + 1, dtype=np.uint64) * GOLDEN
        numbers: np.ndarray = (_mixed(self.keys[:, None] + number) >> MANTISSA) * 2.0**-53
        return numbers

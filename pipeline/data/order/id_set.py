"""Sorted sets of ids that take a bit for each image, or nothing where the ids are one after the other."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

# Bits whose number of ids is counted once: 8 words of 64.
BITS_PER_COUNT = 512
# Ids that are turned into bits at a time.
BITS_AT_A_TIME = 1 << 22


class IdSet(ABC):
    """Sorted, distinct, non-negative ids. The position of an id is the number of smaller ones."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def select_ids(self, positions: np.ndarray) -> np.ndarray:
        """Returns the ids at `positions`, (m,) int64 in 0..len-1."""

    @abstractmethod
    def find_positions(self, ids: np.ndarray) -> np.ndarray:
        """Returns the positions of (m,) ids, -1 for those that are not in the set."""

    @abstractmethod
    def count_smaller(self, numbers: np.ndarray) -> np.ndarray:
        """Returns how many ids are smaller than each of (m,) numbers."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory of the set in bytes."""

    @abstractmethod
    def hash_ids(self) -> str:
        """Returns a hash of the ids: equal for equal sets of the same class."""

    def list_ids(self) -> np.ndarray:
        """Returns all ids, (len,) int64."""
        return self.select_ids(np.arange(len(self)))


def make_id_set(ids: np.ndarray) -> IdSet:
    """Returns the set of sorted, distinct ids, in the form that takes less memory."""
    parts = [_find_breaks(ids, k) for k in range(1, len(ids), BITS_AT_A_TIME)]
    breaks = np.concatenate([np.zeros(1, np.int64), *parts])
    runs = IdRuns(ids[breaks].astype(np.int64), np.concatenate([breaks, [len(ids)]]))
    return runs if runs.nbytes <= (int(ids[-1]) - int(ids[0])) // 7 else _make_bits(ids)


def _find_breaks(ids: np.ndarray, start: int) -> np.ndarray:
    """Returns the positions, of the `BITS_AT_A_TIME` from `start` on, whose id does not follow the one before."""
    part = ids[start - 1 : start + BITS_AT_A_TIME]
    return np.flatnonzero(part[1:] - part[:-1] != 1) + start


@dataclass(frozen=True, eq=False)
class IdRuns(IdSet):
    """A set of few runs of ids that are one after the other."""

    # (r,) the first id of each run; (r + 1,) the position of it, and the number of all ids.
    firsts: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def select_ids(self, positions: np.ndarray) -> np.ndarray:
        run = np.searchsorted(self.offsets, positions, side="right") - 1
        return np.asarray(self.firsts[run] + (positions - self.offsets[run]))

    def find_positions(self, ids: np.ndarray) -> np.ndarray:
        run = np.searchsorted(self.firsts, ids, side="right") - 1
        found = self.offsets[run] + (ids - self.firsts[run])
        return np.where((run >= 0) & (found < self.offsets[run + 1]), found, -1)

    def count_smaller(self, numbers: np.ndarray) -> np.ndarray:
        run = np.searchsorted(self.firsts, numbers, side="right") - 1
        found = np.minimum(self.offsets[run] + (numbers - self.firsts[run]), self.offsets[run + 1])
        return np.where(run >= 0, found, 0)

    @property
    def nbytes(self) -> int:
        return self.firsts.nbytes + self.offsets.nbytes

    def hash_ids(self) -> str:
        return hashlib.sha256(b"runs" + self.firsts.tobytes() + self.offsets.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class IdBits(IdSet):
    """A set as one bit for every number from its first id on."""

    first: int
    # (c, BITS_PER_COUNT / 8) uint8, the lowest bit first; (c + 1,) the number of ids before each row of bits.
    bits: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return int(self.counts[-1])

    def select_ids(self, positions: np.ndarray) -> np.ndarray:
        if not len(positions):
            return np.empty(0, np.int64)
        rows = np.searchsorted(self.counts, positions, side="right") - 1
        distinct, places = np.unique(rows, return_inverse=True)
        # The position in each row of its k-th id, for all k.
        inside = [np.flatnonzero(row) for row in np.unpackbits(self.bits[distinct], axis=1, bitorder="little")]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in inside])])[:-1]
        ranks = positions - self.counts[rows]
        return np.asarray(self.first + rows * BITS_PER_COUNT + np.concatenate(inside)[starts[places] + ranks])

    def find_positions(self, ids: np.ndarray) -> np.ndarray:
        before = self.count_smaller(ids)
        return np.where(self.count_smaller(ids + 1) > before, before, -1)

    def count_smaller(self, numbers: np.ndarray) -> np.ndarray:
        places = np.clip(numbers - self.first, 0, len(self.bits) * BITS_PER_COUNT)
        rows, bit = np.divmod(places, BITS_PER_COUNT)
        # A place after the last row of bits has no bits before it in a row of its own.
        unpacked = np.unpackbits(self.bits[np.minimum(rows, len(self.bits) - 1)], axis=1, bitorder="little")
        inside = np.where(np.arange(BITS_PER_COUNT) < bit[:, None], unpacked, 0).sum(1, dtype=np.int64)
        return np.asarray(self.counts[rows] + inside)

    def list_ids(self) -> np.ndarray:
        rows = max(1, BITS_AT_A_TIME // BITS_PER_COUNT)
        parts = [
            np.flatnonzero(np.unpackbits(self.bits[k : k + rows], bitorder="little")) + k * BITS_PER_COUNT
            for k in range(0, len(self.bits), rows)
        ]
        return np.asarray(np.concatenate(parts) + self.first)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.counts.nbytes

    def hash_ids(self) -> str:
        return hashlib.sha256(f"bits {self.first} ".encode() + self.bits.tobytes()).hexdigest()


def _make_bits(ids: np.ndarray) -> IdBits:
    first = int(ids[0])
    rows = (int(ids[-1]) - first) // BITS_PER_COUNT + 1
    bits = np.zeros((rows, BITS_PER_COUNT // 8), np.uint8)
    flat = bits.reshape(-1)
    for start in range(0, rows * BITS_PER_COUNT, BITS_AT_A_TIME):
        stop = min(start + BITS_AT_A_TIME, rows * BITS_PER_COUNT)
        own = ids[np.searchsorted(ids, first + start) : np.searchsorted(ids, first + stop)]
        mask = np.zeros(stop - start, np.bool_)
        mask[own - (first + start)] = True
        flat[start // 8 : stop // 8] = np.packbits(mask, bitorder="little")
    per_row = np.bitwise_count(bits).sum(1, dtype=np.int64)
    return IdBits(first, bits, np.concatenate([np.zeros(1, np.int64), np.cumsum(per_row)]))

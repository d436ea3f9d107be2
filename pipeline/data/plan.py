"""Assigns images to batches: a pure function of (ids, seed, epoch), the same for any number of workers.

An epoch is a matrix of ids, (steps, batch_size): row g is global batch g, and rank r of w trains on its r-th w-th part.
Small sets are permuted as a whole. Large ones are permuted by windows, so that a task reads whole row groups instead of
one row of each:

    row groups, permuted | cut into `lanes` equal lanes | each lane cut into windows | rows permuted inside a window
    global batch = the next batch_size / lanes rows of every lane

A batch thus mixes rows of `lanes` windows from all over the store, and a rank reads only the lanes that its part of the
batch comes from.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

MAX_LANES = 16


class TrainingPlan(ABC):
    """The global batches of a training, epoch by epoch.

    Equal plans have equal keys. Epochs are cached by the key, also in the decoding tasks.
    """

    key: str
    # Sorted, distinct int64 ids of all images that are trained on.
    ids: np.ndarray
    batch_size: int
    # Number of images that a decoding task may read.
    window: int

    @property
    def num_ids(self) -> int:
        """Number of images that are trained on."""
        return len(self.ids)

    def find_positions(self, ids: np.ndarray) -> np.ndarray:
        """Returns the positions of (m,) ids among the sorted ids that are trained on, -1 for others."""
        found = np.searchsorted(self.ids, ids)
        is_member = self.ids[np.minimum(found, len(self.ids) - 1)] == ids
        return np.where(is_member, found, -1)

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of global batches in an epoch."""

    @property
    @abstractmethod
    def steps_per_task(self) -> int:
        """Number of steps that one decoding task loads."""

    def count_task_steps(self, world: int) -> int:
        """Returns the number of steps that one decoding task of one of `world` ranks loads."""
        return self.steps_per_task

    @abstractmethod
    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the ids of the global batches of an epoch, (steps, batch_size) int64."""

    @abstractmethod
    def passes(self, epoch: int) -> np.ndarray:
        """Returns the pass over the images that each row of `epoch` is in, (steps, batch_size) int64.

        The augmentation of an image is a function of its pass.
        """

    @abstractmethod
    def tail(self, epoch: int, steps: int | None = None) -> np.ndarray:
        """Returns the ids that the first `steps` steps of an epoch leave out.

        A whole epoch, `steps` is None, leaves out fewer than a batch.
        """

    def slice(self, epoch: int, step: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids (batch_size / world,) that `rank` trains on in a step of an epoch, and their passes."""
        part = self.batch_size // world
        return self.take_rows(epoch, step, rank * part, (rank + 1) * part)

    def take_rows(self, epoch: int, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of the rows `start` .. `stop` - 1 of a global batch, and their passes."""
        return self.epoch(epoch)[step, start:stop], self.passes(epoch)[step, start:stop]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingPlan) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class BatchPlan(TrainingPlan):
    """Every epoch is one pass over `ids` in random order."""

    ids: np.ndarray
    # The first id of every row group of the store, ascending; the ids between two starts are stored together.
    group_starts: np.ndarray
    batch_size: int
    seed: int
    # Number of images of a window, over all lanes.
    window: int
    # True: permute by windows. False: permute the whole set.
    windowed: bool
    key: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256(f"{self.batch_size} {self.seed} {self.window} {self.windowed}".encode())
        content.update(np.ascontiguousarray(self.ids, dtype=np.int64).tobytes())
        content.update(np.ascontiguousarray(self.group_starts, dtype=np.int64).tobytes())
        object.__setattr__(self, "key", content.hexdigest())

    @property
    def steps(self) -> int:
        """Number of global batches in an epoch. The images that do not fill one are left out; they differ by epoch."""
        return len(self.ids) // self.batch_size

    @property
    def lanes(self) -> int:
        """Number of lanes: the largest divisor of the batch size up to MAX_LANES; 1 without windows."""
        return max(k for k in range(1, MAX_LANES + 1) if self.batch_size % k == 0) if self.windowed else 1

    @property
    def steps_per_task(self) -> int:
        """Number of steps whose rows make one window over all lanes, which is what one decoding task loads."""
        return max(1, min(self.window // self.batch_size, self.steps))

    def epoch(self, epoch: int) -> np.ndarray:
        return _shuffle_epoch(self, epoch)

    def passes(self, epoch: int) -> np.ndarray:
        return np.broadcast_to(np.int64(epoch), (self.steps, self.batch_size))

    def tail(self, epoch: int, steps: int | None = None) -> np.ndarray:
        return np.setdiff1d(self.ids, self.epoch(epoch)[:steps].ravel(), assume_unique=True)


@dataclass(frozen=True, eq=False)
class SemiSupervisedPlan(TrainingPlan):
    """Batches with exactly `labelled.batch_size` labelled images (R of T in the paper on clustering and locality).

    An epoch is one pass over the images of `rest`. The images of `labelled` are fewer and go through several passes
    meanwhile; each pass augments them differently. They are evenly spaced in a batch, so that every worker, and every
    part of its share, has the same number if the numbers divide.
    """

    labelled: TrainingPlan
    rest: TrainingPlan
    batch_size: int = field(init=False)
    window: int = field(init=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", self.rest.window)
        object.__setattr__(self, "batch_size", self.labelled.batch_size + self.rest.batch_size)
        object.__setattr__(self, "key", hashlib.sha256(f"{self.labelled.key} {self.rest.key}".encode()).hexdigest())

    @cached_property
    def ids(self) -> np.ndarray:  # type: ignore[override]
        return np.union1d(self.labelled.ids, self.rest.ids)

    @property
    def steps(self) -> int:
        return self.rest.steps

    @property
    def steps_per_task(self) -> int:
        return max(1, min(self.rest.window // self.batch_size, self.steps))

    def count_task_steps(self, world: int) -> int:
        return min(self.steps_per_task, self.rest.count_task_steps(world))

    @property
    def positions(self) -> np.ndarray:
        """Positions of the labelled images in a batch, (R,)."""
        return np.arange(self.labelled.batch_size) * self.batch_size // self.labelled.batch_size

    def epoch(self, epoch: int) -> np.ndarray:
        return _mix_epoch(self, epoch)[0]

    def passes(self, epoch: int) -> np.ndarray:
        return _mix_epoch(self, epoch)[1]

    def take_rows(self, epoch: int, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        is_labelled = np.isin(np.arange(self.batch_size), self.positions)
        before, within = int(is_labelled[:start].sum()), is_labelled[start:stop]
        count = int(within.sum())
        ids, passes = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        # The number of other images before the row `start` is `start - before`.
        first, number = start - before, stop - start - count
        ids[~within], passes[~within] = self.rest.take_rows(epoch, step, first, first + number)
        turn, own_step = divmod(epoch * self.steps + step, self.labelled.steps)
        ids[within], passes[within] = self.labelled.take_rows(turn, own_step, before, before + count)
        return ids, passes

    def tail(self, epoch: int, steps: int | None = None) -> np.ndarray:
        return self.rest.tail(epoch, steps)


@lru_cache(maxsize=4)
def _mix_epoch(plan: SemiSupervisedPlan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and passes of an epoch, both (steps, batch_size) int64."""
    batches = np.empty((plan.steps, plan.batch_size), np.int64)
    passes = np.full_like(batches, epoch)
    others = np.setdiff1d(np.arange(plan.batch_size), plan.positions)
    batches[:, others] = plan.rest.epoch(epoch)
    for step in range(plan.steps):
        labelled_pass, labelled_step = divmod(epoch * plan.steps + step, plan.labelled.steps)
        batches[step, plan.positions] = plan.labelled.epoch(labelled_pass)[labelled_step]
        passes[step, plan.positions] = labelled_pass
    return batches, passes


@lru_cache(maxsize=4)
def _shuffle_epoch(plan: BatchPlan, epoch: int) -> np.ndarray:
    """Returns the ids of an epoch, (steps, batch_size) int64."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((plan.seed, epoch, 0x0F1A57))))
    used = plan.steps * plan.batch_size
    if not plan.windowed:
        return rng.permutation(plan.ids)[:used].reshape(plan.steps, plan.batch_size)
    groups = np.split(plan.ids, np.searchsorted(plan.ids, plan.group_starts[1:]))
    order = np.concatenate([groups[k] for k in rng.permutation(len(groups))])
    # A random rotation, so that the tail is not always the end of some row group.
    lanes = np.roll(order, rng.integers(len(order)))[:used].reshape(plan.lanes, -1)
    rows = plan.steps_per_task * plan.batch_size // plan.lanes
    for lane in lanes:
        for start in range(0, len(lane), rows):
            rng.shuffle(lane[start : start + rows])
    return np.ascontiguousarray(
        lanes.reshape(plan.lanes, plan.steps, -1).swapaxes(0, 1).reshape(plan.steps, plan.batch_size)
    )

"""The order of very many images, drawn where it is used: a pure function of (ids, seed, epoch, step).

It is that of windows in `plan.py` with as many lanes as a batch has rows for, so that a rank reads the row groups of
its own lanes and nothing else:

    row groups, permuted | cut into `lanes` equal lanes | each lane cut into windows | rows permuted inside a window
    global batch = the next batch_size / lanes rows of every lane

Nothing is as long as the images but a bit for each of them, and that only if images in between are held out. The
permutation of an epoch is that of the row groups; the rows of a window are permuted by a key of their own.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from firstlight.pipeline.data.order.id_set import IdSet
from firstlight.pipeline.data.order.row_orders import derive_order_key, derive_row_keys, draw_row_orders
from firstlight.pipeline.data.plan import MAX_LANES, TrainingPlan

# The number of images from which on a plan of lanes is chosen by itself.
LANE_PLAN_IMAGES = 1 << 24
# Rows that a batch takes of a lane, where that gives more than `MAX_LANES` lanes; and the images of a rank in a batch
# for which a window of all its lanes is what a task may read.
ROWS_PER_LANE, RANK_IMAGES = 64, 256
# Parts of the row groups whose positions are found one after another, to bound the memory.
NUM_START_PARTS = 256
# Constants of the keys, so that what they draw is independent.
GROUP_STREAM, ROW_STREAM = 0x6A0E, 0x6A0F


@dataclass(frozen=True, eq=False)
class LanePlan(TrainingPlan):
    """Every epoch is one pass over the ids, row group by row group in every lane."""

    id_set: IdSet
    # The first id of every row group of the store, ascending; the ids between two starts are stored together.
    group_starts: np.ndarray
    batch_size: int
    seed: int
    # Number of images that a decoding task may read.
    window: int
    key: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256(f"lanes {self.batch_size} {self.seed} {self.window} {self.id_set.hash_ids()}".encode())
        content.update(np.ascontiguousarray(self.group_starts, dtype=np.int64).tobytes())
        object.__setattr__(self, "key", content.hexdigest())

    @property
    def ids(self) -> np.ndarray:  # type: ignore[override]
        """All ids, computed at each call."""
        return self.id_set.list_ids()

    @property
    def num_ids(self) -> int:
        return len(self.id_set)

    def find_positions(self, ids: np.ndarray) -> np.ndarray:
        return self.id_set.find_positions(ids)

    @property
    def steps(self) -> int:
        """Number of global batches in an epoch. The images that do not fill one are left out; they differ by epoch."""
        return self.num_ids // self.batch_size

    @property
    def lanes(self) -> int:
        """Number of lanes: the largest divisor of the batch size up to MAX_LANES, or to a lane for ROWS_PER_LANE."""
        most = max(MAX_LANES, self.batch_size // ROWS_PER_LANE)
        return max(k for k in range(1, most + 1) if self.batch_size % k == 0)

    @property
    def lane_rows(self) -> int:
        """Number of rows of a lane in a batch."""
        return self.batch_size // self.lanes

    @property
    def window_steps(self) -> int:
        """Number of steps that a window has rows for."""
        return max(1, min(self.window // min(self.batch_size, RANK_IMAGES), self.steps))

    @property
    def steps_per_task(self) -> int:
        return self.count_task_steps(1)

    def count_task_steps(self, world: int) -> int:
        """Returns the largest number of steps that divides a window and has at most `window` images of a rank."""
        most = max(1, self.window * world // self.batch_size)
        return max(k for k in range(1, self.window_steps + 1) if self.window_steps % k == 0 and k <= most)

    def epoch(self, epoch: int) -> np.ndarray:
        found = np.empty((self.steps, self.batch_size), np.int64)
        for step in range(self.steps):
            found[step] = self.take_rows(epoch, step, 0, self.batch_size)[0]
        return found

    def passes(self, epoch: int) -> np.ndarray:
        return np.broadcast_to(np.int64(epoch), (self.steps, self.batch_size))

    def take_rows(self, epoch: int, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        window, its_step = divmod(step, self.window_steps)
        first, end = start // self.lane_rows, -(-stop // self.lane_rows)
        rows = _draw_window(self, epoch, window, first, end)[its_step]
        skipped = first * self.lane_rows
        return rows[start - skipped : stop - skipped], np.broadcast_to(np.int64(epoch), (stop - start,))

    def tail(self, epoch: int, steps: int | None = None) -> np.ndarray:
        never_used = _order_groups(self, epoch).select_ids(np.arange(self.steps * self.batch_size, self.num_ids))
        if steps is None:
            return np.sort(never_used)
        later = [self.take_rows(epoch, step, 0, self.batch_size)[0] for step in range(steps, self.steps)]
        return np.sort(np.concatenate([*later, never_used]))

    @cached_property
    def group_bounds(self) -> np.ndarray:
        """(g + 1,) int64: the position of the first id of every row group, and the number of ids."""
        starts = [self.id_set.count_smaller(part) for part in np.array_split(self.group_starts, NUM_START_PARTS)]
        return np.concatenate([np.zeros(1, np.int64), np.concatenate(starts)[1:], [self.num_ids]])

    def __getstate__(self) -> dict[str, object]:
        """Leaves out what each process computes again."""
        return {name: value for name, value in vars(self).items() if name != "group_bounds"}


@dataclass(frozen=True)
class GroupOrder:
    """The row groups of an epoch in their random order, one after another from a random place on."""

    plan: LanePlan
    # (g,) the row groups, and (g,) the number of ids up to the end of each.
    groups: np.ndarray
    ends: np.ndarray
    offset: int

    def select_ids(self, places: np.ndarray) -> np.ndarray:
        """Returns the ids at `places` of the order, in their shape."""
        turned = (places.ravel() + self.offset) % self.plan.num_ids
        index = np.searchsorted(self.ends, turned, side="right")
        bounds = self.plan.group_bounds
        group = self.groups[index]
        # The distance to the end of the row group is the same here and among the sorted ids.
        positions = bounds[group + 1] - (self.ends[index] - turned)
        return self.plan.id_set.select_ids(positions).reshape(places.shape)


@lru_cache(maxsize=2)
def _order_groups(plan: LanePlan, epoch: int) -> GroupOrder:
    key = derive_order_key(plan.seed, epoch, GROUP_STREAM)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    sizes = np.diff(plan.group_bounds)
    groups = rng.permutation(np.arange(len(sizes), dtype=np.int32))
    return GroupOrder(plan, groups, np.cumsum(sizes[groups]), int(rng.integers(plan.num_ids)))


@lru_cache(maxsize=16)
def _draw_window(plan: LanePlan, epoch: int, window: int, first: int, end: int) -> np.ndarray:
    """Returns the ids of the lanes first .. end - 1 in a window, (steps, (end - first) * rows of a lane)."""
    steps = min(plan.window_steps, plan.steps - window * plan.window_steps)
    lanes, rows = np.arange(first, end), plan.lane_rows
    begins = (lanes * plan.steps + window * plan.window_steps) * rows
    keys = derive_row_keys(derive_order_key(plan.seed, epoch, ROW_STREAM, window), lanes)
    places = begins[:, None] + draw_row_orders(keys, steps * rows)
    ids = _order_groups(plan, epoch).select_ids(places).reshape(len(lanes), steps, rows)
    return np.ascontiguousarray(ids.swapaxes(0, 1).reshape(steps, -1))

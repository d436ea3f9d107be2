"""The images that a worker sees in each global batch, and what it reads for them.

They follow from the plan of trainings, over fewer images.
"""

import time
from dataclasses import dataclass

import numpy as np

from bench.scaling.memory import measure_lane_plan_bytes
from firstlight.pipeline.data.manifest import ROWS_PER_GROUP
from firstlight.pipeline.data.order.id_set import make_id_set
from firstlight.pipeline.data.order.lane_plan import LanePlan
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.stream import TrainOrder

# Global batches of the images; with so many, lanes and windows are as over any number of images
NUM_BATCHES = 16


@dataclass(frozen=True)
class ReadingStats:
    """Means over the tasks of workers.

    Attributes:
        groups: row groups that a task reads.
        used: images that a task uses.
        share: the share of all row groups that a worker reads in an epoch.
        seconds: to draw the order of an epoch, for each image.
    """

    lanes: int
    groups: float
    used: float
    share: float
    seconds: float

    @property
    def amplification(self) -> float:
        """Images read / images used."""
        return self.groups * ROWS_PER_GROUP / self.used


def make_plan(batch: int, window: int, images: int | None = None) -> BatchPlan:
    """Returns a plan over `images` images; over `NUM_BATCHES` global batches if it is None."""
    ids = np.arange(images or NUM_BATCHES * batch)
    return BatchPlan(ids, np.arange(0, len(ids), ROWS_PER_GROUP), batch, 0, window, True)


def make_lane_plan(batch: int, window: int, images: int | None = None) -> LanePlan:
    """Returns a plan of lanes, otherwise as `make_plan`."""
    ids = np.arange(images or NUM_BATCHES * batch)
    return LanePlan(make_id_set(ids), np.arange(0, len(ids), ROWS_PER_GROUP), batch, 0, window)


def list_task_ids(order: BatchPlan | LanePlan, rank: int, world: int) -> list[np.ndarray]:
    """Returns the ids that each decoding task of a rank reads in the first epoch."""
    tasks = TrainOrder(order, rank, world, 0, order.steps)
    return [np.concatenate([ids for ids, _ in tasks.list_batches(k)]) for k in range(len(tasks))]


def measure_plan_reading(order: BatchPlan | LanePlan, world: int) -> ReadingStats:
    """Returns the means over the first, a middle and the last worker."""
    begun = time.process_time()
    drawn = order.epoch(0)
    seconds = (time.process_time() - begun) / drawn.size
    found = [list_task_ids(order, rank, world) for rank in {0, world // 2, world - 1}]
    groups = [len(np.unique(task // ROWS_PER_GROUP)) for tasks in found for task in tasks]
    used = [len(task) for tasks in found for task in tasks]
    share = [len(np.unique(np.concatenate(tasks) // ROWS_PER_GROUP)) / len(order.group_starts) for tasks in found]
    return ReadingStats(order.lanes, float(np.mean(groups)), float(np.mean(used)), float(np.mean(share)), seconds)


def time_lane_plan(images: int, held_out: bool, batch: int = 8192, world: int = 32) -> dict[str, float]:
    """Returns the CPU seconds of a process for a plan of lanes over `images` images, and its memory in bytes.

    `held_out`: every hundredth image is not trained on.
    """
    ids = np.flatnonzero(np.arange(images) % 100) if held_out else np.arange(images)
    found, begun = dict[str, float](), time.process_time()

    def stop(name: str) -> None:
        nonlocal begun
        found[name] = time.process_time() - begun
        begun = time.process_time()

    order = LanePlan(make_id_set(ids), np.arange(0, images, ROWS_PER_GROUP), batch, 0, 2048)
    stop("start")
    order.slice(0, 0, 1, world)
    stop("first batch")
    order.slice(1, 0, 1, world)
    stop("next epoch")
    order.slice(1, order.window_steps, 1, world)
    stop("next window")
    return {**found, "bytes": float(sum(measure_lane_plan_bytes(order).values()))}

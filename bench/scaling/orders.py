"""Which images a worker sees in each global batch, and what it reads for them: by the plan that trainings follow, over fewer images."""

import time
from dataclasses import dataclass

import numpy as np

from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import ROW_GROUP
from firstlight.pipeline.data.stream import TrainOrder

BATCHES = 16  # global batches of the images that are looked at: lanes and windows are then as they are over any number


@dataclass(frozen=True)
class Reading:
    """Of a worker's tasks, means. `groups`: row groups that a task reads; `used`: its images; `share`: of the row groups of all images, those that
    the worker reads in an epoch; `seconds`: to draw an epoch's order, for each image."""

    lanes: int
    groups: float
    used: float
    share: float
    seconds: float

    @property
    def amplification(self) -> float:
        """Images read / images used."""
        return self.groups * ROW_GROUP / self.used


def plan(batch: int, window: int, images: int | None = None) -> BatchPlan:
    ids = np.arange(images or BATCHES * batch)
    return BatchPlan(ids, np.arange(0, len(ids), ROW_GROUP), batch, 0, window, True)


def parts(order: BatchPlan, rank: int, world: int) -> list[np.ndarray]:
    """The ids of each task of a rank, in the first epoch: what its decoding tasks are told to read."""
    tasks = TrainOrder(order, rank, world, 0, order.steps)
    return [np.concatenate([ids for ids, _ in tasks.task(k)]) for k in range(len(tasks))]


def reading(batch: int, window: int, world: int) -> Reading:
    order = plan(batch, window)
    begun = time.process_time()
    drawn = order.epoch(0)
    seconds = (time.process_time() - begun) / drawn.size
    found = [parts(order, rank, world) for rank in {0, world // 2, world - 1}]
    groups = [len(np.unique(task // ROW_GROUP)) for tasks in found for task in tasks]
    used = [len(task) for tasks in found for task in tasks]
    share = [len(np.unique(np.concatenate(tasks) // ROW_GROUP)) / len(order.group_starts) for tasks in found]
    return Reading(order.lanes, float(np.mean(groups)), float(np.mean(used)), float(np.mean(share)), seconds)

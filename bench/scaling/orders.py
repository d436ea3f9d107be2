"""The images that a worker sees in each global batch, and what it reads for them.

They follow from the plan of trainings, over fewer images.
"""

import time
from dataclasses import dataclass

import numpy as np

from firstlight.pipeline.data.manifest import ROWS_PER_GROUP
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


def list_task_ids(order: BatchPlan, rank: int, world: int) -> list[np.ndarray]:
    """Returns the ids that each decoding task of a rank reads in the first epoch."""
    tasks = TrainOrder(order, rank, world, 0, order.steps)
    return [np.concatenate([ids for ids, _ in tasks.list_batches(k)]) for k in range(len(tasks))]


def measure_plan_reading(batch: int, window: int, world: int) -> ReadingStats:
    """Returns the means over the first, a middle and the last worker."""
    order = make_plan(batch, window)
    begun = time.process_time()
    drawn = order.epoch(0)
    seconds = (time.process_time() - begun) / drawn.size
    found = [list_task_ids(order, rank, world) for rank in {0, world // 2, world - 1}]
    groups = [len(np.unique(task // ROWS_PER_GROUP)) for tasks in found for task in tasks]
    used = [len(task) for tasks in found for task in tasks]
    share = [len(np.unique(np.concatenate(tasks) // ROWS_PER_GROUP)) / len(order.group_starts) for tasks in found]
    return ReadingStats(order.lanes, float(np.mean(groups)), float(np.mean(used)), float(np.mean(share)), seconds)

"""The mixing and the cost of windows, compared with a permutation of all images: `python -m bench.mixing`.

The store has 100,000 images in 10 classes, sorted by class like a folder for each class, in row groups of 128 (or
smaller ones if the images are large). Nothing is decoded, as an order is a function of ids. Every number is a mean over
epochs.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.table import Table

from firstlight.pipeline.data.manifest import ROWS_PER_GROUP
from firstlight.pipeline.data.order.id_set import make_id_set
from firstlight.pipeline.data.order.lane_plan import LanePlan
from firstlight.pipeline.data.plan import BatchPlan, TrainingPlan
from firstlight.pipeline.data.row_groups import IMAGE_CACHE_BYTES

MIXING_IMAGES, MIXING_CLASSES, MIXING_BATCH, MIXING_EPOCHS = 100_000, 10, 256, 3
MIXING_WINDOWS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LANE_WINDOWS = (512, 2048, 16384)


@dataclass(frozen=True)
class MixingStats:
    """Statistics of a plan, means over batches and epochs.

    Attributes:
        distance: total variation between the classes of a batch and those of the store, 0 to 1.
        num_groups: row groups that a batch comes from.
        order_correlation: absolute value of Spearman's correlation of the positions in the store and in the epoch.
        neighbours_meet: share of pairs of images stored next to each other that are in one batch.
        pairs_meet_again: share of pairs of images of a batch that are also in one batch of the next epoch.
        read_ratio: images read for each image used, if a task keeps nothing.
        task_images: encoded images that a task reads.
    """

    distance: float
    num_groups: float
    order_correlation: float
    neighbours_meet: float
    pairs_meet_again: float
    read_ratio: float
    task_images: float


def measure_mixing(plan: TrainingPlan) -> MixingStats:
    """Returns the statistics of a plan over `MIXING_EPOCHS` epochs."""
    orders = [plan.epoch(epoch) for epoch in range(MIXING_EPOCHS)]
    rows = [
        (
            _class_distance(o),
            _count_row_groups(o),
            _correlate_order(o),
            _count_neighbour_meetings(o),
            *_count_reads(plan, o),
        )
        for o in orders
    ]
    distance, groups, order, meet, read, held = np.mean(rows, axis=0).tolist()
    again = float(np.mean([_count_repeated_pairs(a, b) for a, b in pairwise(orders)]))
    return MixingStats(distance, groups, order, meet, again, read, held)


def _class_distance(order: np.ndarray) -> float:
    """Returns the mean total variation between the classes of a batch and uniform classes, 0 to 1."""
    shares = np.stack([(order * MIXING_CLASSES // MIXING_IMAGES == c).mean(1) for c in range(MIXING_CLASSES)], 1)
    return float(np.abs(shares - 1 / MIXING_CLASSES).sum(1).mean() / 2)


def _count_row_groups(order: np.ndarray) -> float:
    """Returns the mean number of row groups of a batch."""
    return float(np.mean([len(np.unique(batch // ROWS_PER_GROUP)) for batch in order]))


def _correlate_order(order: np.ndarray) -> float:
    """Returns the absolute value of Spearman's correlation.

    An epoch uses nearly all ids, so the ids are their own ranks.
    """
    return float(abs(np.corrcoef(order.ravel(), np.arange(order.size))[0, 1]))


def _count_neighbour_meetings(order: np.ndarray) -> float:
    """Returns the share of pairs of images stored next to each other that are in one batch."""
    step = _find_steps(order)
    both = (step[1:] >= 0) & (step[:-1] >= 0)
    return float((step[1:] == step[:-1])[both].mean())


def _count_repeated_pairs(before: np.ndarray, after: np.ndarray) -> float:
    """Returns the share of pairs of a batch that are also in one batch of the next epoch."""
    step = _find_steps(after)[before]
    pairs = 0
    for batch in step:
        counts = np.unique(batch[batch >= 0], return_counts=True)[1]
        pairs += int((counts * (counts - 1)).sum())
    return float(pairs / (before.size * (before.shape[1] - 1)))


def _find_steps(order: np.ndarray) -> np.ndarray:
    """Returns (MIXING_IMAGES,) the step of each image, -1 if it is in none."""
    step = np.full(MIXING_IMAGES, -1)
    step[order.ravel()] = np.repeat(np.arange(len(order)), order.shape[1])
    return step


def _count_reads(plan: TrainingPlan, order: np.ndarray) -> tuple[float, float]:
    """Returns the images in the row groups that tasks touch, for each image used; and their number for each task."""
    starts = range(0, plan.steps, plan.steps_per_task)
    read = [len(np.unique(order[k : k + plan.steps_per_task] // ROWS_PER_GROUP)) * ROWS_PER_GROUP for k in starts]
    return sum(read) / order.size, float(np.mean(read))


def make_mixing_plans() -> dict[str, TrainingPlan]:
    """Returns the plan of each window, of a permutation of all images, and of lanes with some of the windows."""
    ids, starts = np.arange(MIXING_IMAGES), np.arange(0, MIXING_IMAGES, ROWS_PER_GROUP)
    windowed = {f"{window:,}": BatchPlan(ids, starts, MIXING_BATCH, 0, window, True) for window in MIXING_WINDOWS}
    lanes = {
        f"lanes, {window:,}": LanePlan(make_id_set(ids), starts, MIXING_BATCH, 0, window) for window in LANE_WINDOWS
    }
    return {**windowed, "global": BatchPlan(ids, starts, MIXING_BATCH, 0, 2048, False), **lanes}


def main() -> None:
    """Measures all plans and prints a table."""
    rows = {name: measure_mixing(plan) for name, plan in make_mixing_plans().items()}
    # The share of pairs of images that are in one batch by chance
    even = MIXING_BATCH / MIXING_IMAGES
    out = Table(
        title=f"{MIXING_IMAGES:,} images sorted by class, batches of {MIXING_BATCH}; "
        f"by chance two images meet {even:.2%} of the time"
    )
    for heading in (
        "window",
        "class distance",
        "row groups a batch",
        "order",
        "neighbours meet",
        "pairs meet again",
        "read / used",
        "a task reads",
    ):
        out.add_column(heading, justify="right")
    for name, stats in rows.items():
        meet, again = f"{stats.neighbours_meet:.2%}", f"{stats.pairs_meet_again:.2%}"
        out.add_row(
            name,
            f"{stats.distance:.3f}",
            f"{stats.num_groups:.0f}",
            f"{stats.order_correlation:.3f}",
            meet,
            again,
            f"{stats.read_ratio:.2f}",
            f"{stats.task_images:,.0f} images",
        )
    console = Console(width=150)
    console.print(out)
    console.print(
        f"A task keeps at most {IMAGE_CACHE_BYTES / 1e6:.0f} MB of encoded images: "
        "the largest window is that many bytes / those of an image."
    )


if __name__ == "__main__":
    main()

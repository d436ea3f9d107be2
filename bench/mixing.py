"""How well windows mix, and what they cost, beside a permutation of the whole: `python -m bench.mixing`.

A store of 100,000 images in 10 classes, sorted by class as a folder per class is, in row groups of 128 (or fewer, where they are large). Nothing is
decoded: an order is a function of ids. Every number is a mean over epochs.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.table import Table

from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import CACHE_BYTES, ROW_GROUP

IMAGES, CLASSES, BATCH, EPOCHS = 100_000, 10, 256, 3
WINDOWS = (256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Mixing:
    """Of a plan, means over batches and epochs.

    `distance`: total variation between the classes of a batch and those of the store, 0..1. `groups`: row groups that a batch comes from.
    `order`: |Spearman's correlation| of the place in the store and in the epoch. `meet`: how often two images that are stored side by side are in
    one batch. `again`: how often two images of a batch meet again in the next epoch's. `read`: images read for an image used, where a task keeps
    nothing. `held`: encoded images that a task reads.
    """

    distance: float
    groups: float
    order: float
    meet: float
    again: float
    read: float
    held: float


def measured(plan: BatchPlan) -> Mixing:
    orders = [plan.epoch(epoch) for epoch in range(EPOCHS)]
    rows = [(_distance(o), _groups(o), _order(o), _meet(o), *_reading(plan, o)) for o in orders]
    distance, groups, order, meet, read, held = np.mean(rows, axis=0).tolist()
    again = float(np.mean([_again(a, b) for a, b in pairwise(orders)]))
    return Mixing(distance, groups, order, meet, again, read, held)


def _distance(order: np.ndarray) -> float:
    shares = np.stack([(order * CLASSES // IMAGES == c).mean(1) for c in range(CLASSES)], 1)
    return float(np.abs(shares - 1 / CLASSES).sum(1).mean() / 2)


def _groups(order: np.ndarray) -> float:
    return float(np.mean([len(np.unique(batch // ROW_GROUP)) for batch in order]))


def _order(order: np.ndarray) -> float:
    """Spearman's correlation: the ids that an epoch uses are nearly all, so they are their own ranks."""
    return float(abs(np.corrcoef(order.ravel(), np.arange(order.size))[0, 1]))


def _meet(order: np.ndarray) -> float:
    step = _steps(order)
    both = (step[1:] >= 0) & (step[:-1] >= 0)
    return float((step[1:] == step[:-1])[both].mean())


def _again(before: np.ndarray, after: np.ndarray) -> float:
    """Pairs of a batch that are also in one batch of the next epoch / all pairs."""
    step = _steps(after)[before]
    pairs = 0
    for batch in step:
        counts = np.unique(batch[batch >= 0], return_counts=True)[1]
        pairs += int((counts * (counts - 1)).sum())
    return float(pairs / (before.size * (before.shape[1] - 1)))


def _steps(order: np.ndarray) -> np.ndarray:
    """(IMAGES,) the step that each image is in, -1 for none."""
    step = np.full(IMAGES, -1)
    step[order.ravel()] = np.repeat(np.arange(len(order)), order.shape[1])
    return step


def _reading(plan: BatchPlan, order: np.ndarray) -> tuple[float, float]:
    """Images in the row groups that a task touches / images that it uses; the former, a task."""
    starts = range(0, plan.steps, plan.steps_per_task)
    read = [len(np.unique(order[k : k + plan.steps_per_task] // ROW_GROUP)) * ROW_GROUP for k in starts]
    return sum(read) / order.size, float(np.mean(read))


def plans() -> dict[str, BatchPlan]:
    ids, starts = np.arange(IMAGES), np.arange(0, IMAGES, ROW_GROUP)
    windowed = {f"{window:,}": BatchPlan(ids, starts, BATCH, 0, window, True) for window in WINDOWS}
    return {**windowed, "global": BatchPlan(ids, starts, BATCH, 0, 2048, False)}


def main() -> None:
    rows = {name: measured(plan) for name, plan in plans().items()}
    even = BATCH / IMAGES  # two given images meet so often by chance
    out = Table(
        title=f"{IMAGES:,} images sorted by class, batches of {BATCH}; by chance two images meet {even:.2%} of the time"
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
    for name, its in rows.items():
        meet, again = f"{its.meet:.2%}", f"{its.again:.2%}"
        out.add_row(
            name,
            f"{its.distance:.3f}",
            f"{its.groups:.0f}",
            f"{its.order:.3f}",
            meet,
            again,
            f"{its.read:.2f}",
            f"{its.held:,.0f} images",
        )
    console = Console(width=150)
    console.print(out)
    console.print(
        f"A task keeps at most {CACHE_BYTES / 1e6:.0f} MB of encoded images: the largest window is that many bytes / those of an image."
    )


if __name__ == "__main__":
    main()

"""Batches of digits: a small plan, and loaders that augment two views."""

import numpy as np

from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions

DIGIT_BATCH = 12
LOCAL_LOADING = LoadingOptions(on_ray=False, prefetch=2, tasks=1, task_cpus=0.25)
DIGIT_OPS = ({"op": "random_shift", "padding": 2}, {"op": "random_affine", "degrees": 20.0})


def digit_plan(store: Store, windowed: bool = False, seed: int = 0) -> BatchPlan:
    """100 ids, far apart; 8 steps, 3 to a task: the last task of an epoch is shorter."""
    return BatchPlan(
        np.arange(3, 503, 5), store.list_row_groups("train")[:, 2], DIGIT_BATCH, seed, 3 * DIGIT_BATCH, windowed
    )


def digit_loader(store: Store, views: int = 2, seed: int = 0) -> Loader:
    return Loader(store, (DIGIT_OPS,) * views, 8, seed, 1_000_000)

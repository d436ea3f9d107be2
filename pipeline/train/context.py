"""What a stage's code finds on a training worker, under Ray Train or in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.recipe import Augment, Recipe, Training
from firstlight.pipeline.data.augment.targets import Targets
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.splits import Splits, split
from firstlight.pipeline.data.store import CACHE_BYTES, Store
from firstlight.pipeline.data.stream import EvalOrder, Loader, Options, batches
from firstlight.pipeline.train import device_cache
from firstlight.pipeline.train.job import to_batch
from firstlight.tasks.collective import rank, world
from firstlight.tasks.downstream.task import Target
from firstlight.tasks.learner import Batch


@dataclass(frozen=True)
class Worker:
    """The recipe, its images, and the device of this worker."""

    recipe: Recipe
    store: Store
    splits: Splits
    device: torch.device
    options: Options

    @staticmethod
    def start(recipe: Recipe, store: Store, on_ray: bool, device: torch.device | None = None) -> "Worker":
        """`device`: that of a training worker; the driver, which only draws, has none.

        Raises:
            UserError: `stream.resident: on` or `stream.augment: device`, where it is not possible.
        """
        torch.set_num_threads(recipe.scale.threads)
        stream, splits = recipe.stream, split(store, recipe.dataset)
        held = splits.train if device_cache.possible(stream, store, len(splits.train)) else None
        options = Options(
            on_ray, stream.prefetch, stream.tasks, stream.task_cpus, held, device_cache.on_device(stream, store)
        )
        return Worker(recipe, store, splits, device or torch.device("cpu"), options)

    def loader(self, views: Sequence[Augment], seed: int, target: Target = "label") -> Loader:
        """Pixels: one augmentation a view; and the targets of the first one."""
        data, ops = self.recipe.dataset, tuple(tuple(op.model_dump() for op in ops) for ops in views)
        targets = None if target == "label" else Targets(target, _most_boxes(self.store) if target == "boxes" else 0)
        return Loader(self.store, ops, data.image_size, seed, data.max_pixels, targets)

    def views(self, training: Training, count: int = 1) -> list[Augment]:
        """The augmentations of the `count` views of a training."""
        return [training.augment or self.recipe.dataset.train_augment] * count

    def plan(self, ids: np.ndarray, batch_size: int, seed: int) -> BatchPlan:
        """The order of a training. A task holds its window's encoded images, so a window has as many as fit the cache, at most."""
        stream, total = self.recipe.stream, sum(shard.bytes for shard in self.store.shards)
        per_image = max(total // sum(shard.count for shard in self.store.shards), 1)
        windowed = stream.shuffle == "windowed" or (stream.shuffle == "auto" and total > CACHE_BYTES)
        return BatchPlan(
            ids,
            self.store.groups("train")[:, 2],
            batch_size,
            seed,
            min(stream.window, CACHE_BYTES // per_image),
            windowed,
        )

    def sweep(
        self, ids: np.ndarray, batch_size: int, views: Sequence[Augment] | None = None, target: Target = "label"
    ) -> Iterator[Batch]:
        """This worker's part of `ids`, once; streamed, also where trainings hold their images. `views`: None: the evaluation augmentation."""
        loader = self.loader(views or [self.recipe.dataset.eval_augment], 0, target)
        for arrays in batches(loader, EvalOrder(ids, batch_size, rank(), world()), batch_size, self.options):
            yield to_batch(arrays, self.device)


@lru_cache(maxsize=4)
def _boxes_at_most(path: str, manifest: str) -> int:
    store = Store.open(Path(path))
    ids = np.arange(sum(store.splits.values()))
    parts = np.array_split(ids, -(-len(ids) // 4096))
    boxes = (found.box_classes for part in parts for found in store.annotated(part))
    return max((len(classes) for classes in boxes if classes is not None), default=0)


def _most_boxes(store: Store) -> int:
    """Of an image, at least 1: batches have as many rows for each. Read once a process."""
    return max(1, _boxes_at_most(str(store.path), store.hash))


def gather_rows(parts: Sequence[Tensor], total: int) -> Tensor:
    """The rows of every worker's sweep over `total` ids -> (total, ...) in the order of the ids, on every worker. Collective."""
    rows = torch.cat(list(parts)) if parts else None
    if world() == 1:
        assert rows is not None
        return rows
    import torch.distributed as dist

    sizes = [len(part) for part in np.array_split(np.arange(total), world())]
    assert rows is not None
    assert len(rows) == sizes[rank()]
    padded = torch.cat((rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])))
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])

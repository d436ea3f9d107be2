"""What a stage's code finds on a training worker, under Ray Train or in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import Augment
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.augment.targets import Targets
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.row_groups import IMAGE_CACHE_BYTES
from firstlight.pipeline.data.splits import Splits, draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import EvalOrder, LoadingOptions, stream_batches
from firstlight.pipeline.train import device_cache
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.downstream.task import TargetKind
from firstlight.tasks.learner import Batch


@dataclass(frozen=True)
class StageContext:
    """The recipe, its images, and the device of this worker."""

    recipe: Recipe
    store: Store
    splits: Splits
    device: torch.device
    options: LoadingOptions

    @staticmethod
    def create(recipe: Recipe, store: Store, on_ray: bool, device: torch.device | None = None) -> "StageContext":
        """`device`: that of a training worker; the driver, which only draws, has none.

        Raises:
            UserError: `stream.resident: on` or `stream.augment: device`, where it is not possible.
        """
        torch.set_num_threads(recipe.scale.threads)
        stream, splits = recipe.stream, draw_splits(store, recipe.dataset)
        held = splits.train if device_cache.should_cache(stream, store, len(splits.train)) else None
        options = LoadingOptions(
            on_ray, stream.prefetch, stream.tasks, stream.task_cpus, held, device_cache.should_augment_on_device(stream, store)
        )
        return StageContext(recipe, store, splits, device or torch.device("cpu"), options)

    def build_loader(self, views: Sequence[Augment], seed: int, target: TargetKind = "label") -> Loader:
        """Pixels: one augmentation a view; and the targets of the first one."""
        data, ops = self.recipe.dataset, tuple(tuple(op.model_dump() for op in ops) for ops in views)
        targets = None if target == "label" else Targets(target, _max_boxes(self.store) if target == "boxes" else 0)
        return Loader(self.store, ops, data.image_size, seed, data.max_pixels, targets)

    def list_view_augments(self, training: TrainingOptions, count: int = 1) -> list[Augment]:
        """The augmentations of the `count` views of a training."""
        return [training.augment or self.recipe.dataset.train_augment] * count

    def build_plan(self, ids: np.ndarray, batch_size: int, seed: int) -> BatchPlan:
        """The order of a training. A task holds its window's encoded images, so a window has as many as fit the cache, at most."""
        stream, total = self.recipe.stream, sum(shard.bytes for shard in self.store.shards)
        per_image = max(total // sum(shard.count for shard in self.store.shards), 1)
        windowed = stream.shuffle == "windowed" or (stream.shuffle == "auto" and total > IMAGE_CACHE_BYTES)
        return BatchPlan(
            ids,
            self.store.list_row_groups("train")[:, 2],
            batch_size,
            seed,
            min(stream.window, IMAGE_CACHE_BYTES // per_image),
            windowed,
        )

    def iterate_batches(
        self, ids: np.ndarray, batch_size: int, views: Sequence[Augment] | None = None, target: TargetKind = "label"
    ) -> Iterator[Batch]:
        """This worker's part of `ids`, once; streamed, also where trainings hold their images. `views`: None: the evaluation augmentation."""
        loader = self.build_loader(views or [self.recipe.dataset.eval_augment], 0, target)
        for arrays in stream_batches(
            loader, EvalOrder(ids, batch_size, rank(), world_size()), batch_size, self.options
        ):
            yield to_batch(arrays, self.device)


@lru_cache(maxsize=4)
def _count_most_boxes(path: str, manifest: str) -> int:
    store = Store.open(Path(path))
    ids = np.arange(sum(store.splits.values()))
    parts = np.array_split(ids, -(-len(ids) // 4096))
    boxes = (found.box_classes for part in parts for found in store.read_annotations(part))
    return max((len(classes) for classes in boxes if classes is not None), default=0)


def _max_boxes(store: Store) -> int:
    """Of an image, at least 1: batches have as many rows for each. Read once a process."""
    return max(1, _count_most_boxes(str(store.path), store.hash))


def gather_rows(parts: Sequence[Tensor], total: int) -> Tensor:
    """The rows of every worker's sweep over `total` ids -> (total, ...) in the order of the ids, on every worker. Collective."""
    rows = torch.cat(list(parts)) if parts else None
    if world_size() == 1:
        assert rows is not None
        return rows
    import torch.distributed as dist

    sizes = [len(part) for part in np.array_split(np.arange(total), world_size())]
    assert rows is not None
    assert len(rows) == sizes[rank()]
    padded = torch.cat((rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])))
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])

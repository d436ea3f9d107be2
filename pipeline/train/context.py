"""The context of a stage: recipe, images and device of this worker, under Ray Train or in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import Augment
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.augment.targets import Targets
from firstlight.pipeline.data.images import read_header_frame
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.order.id_set import make_id_set
from firstlight.pipeline.data.order.lane_plan import LANE_PLAN_IMAGES, LanePlan
from firstlight.pipeline.data.plan import BatchPlan, TrainingPlan
from firstlight.pipeline.data.row_groups import IMAGE_CACHE_BYTES
from firstlight.pipeline.data.splits import Splits, draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions
from firstlight.pipeline.train.accelerator.cpu import set_up_cpu
from firstlight.pipeline.train.held import budget
from firstlight.pipeline.train.held.views import held_views
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.downstream.task import TargetKind
from firstlight.tasks.learner import Batch


@dataclass(frozen=True)
class StageContext:
    """The recipe, its images with their splits, and the device of this worker."""

    recipe: Recipe
    store: Store
    splits: Splits
    device: torch.device
    options: LoadingOptions

    @staticmethod
    def create(recipe: Recipe, store: Store, on_ray: bool, device: torch.device | None = None) -> "StageContext":
        """Draws the splits, decides how images are loaded, and sets up the CPU for torch.

        The driver, which only draws figures, passes no device.

        Raises:
            UserError: `stream.resident: on` or `stream.augment: device` is not possible with these images.
        """
        set_up_cpu(recipe.scale.worker_threads)
        stream, splits = recipe.stream, draw_splits(store, recipe.dataset, recipe.measured_splits)
        held = splits.train if budget.should_cache(stream, store, len(splits.train)) else None
        options = LoadingOptions(
            on_ray,
            stream.prefetch,
            stream.count_tasks(on_ray, recipe.scale.worker_threads),
            stream.task_cpus,
            held,
            budget.should_augment_on_device(stream, store, device is not None and device.type == "cuda"),
            *budget.divide_held_bytes(stream, store, len(splits.train)),
        )
        return StageContext(recipe, store, splits, device or torch.device("cpu"), options)

    def build_loader(
        self,
        views: Sequence[Augment],
        seed: int,
        target: TargetKind = "label",
        whole_masks: bool = False,
        sizes: tuple[int, ...] = (),
    ) -> Loader:
        """Returns a loader of one view for each augmentation in `views`, with the targets of the first view.

        `whole_masks`: the targets are the masks of whole images, and where each view lies in its image. `sizes`: the
        side of each view in pixels; (): all have `dataset.image_size`.
        """
        data, ops = self.recipe.dataset, tuple(tuple(op.model_dump() for op in ops) for ops in views)
        targets = None if target == "label" else Targets(target, _max_boxes(self.store) if target == "boxes" else 0)
        if targets is not None and whole_masks:
            width, height = self.read_mask_sizes().max(0).tolist()
            targets = replace(targets, canvas=(width, height))
        sizes = () if set(sizes) <= {data.image_size} else sizes
        return Loader(self.store, ops, data.image_size, seed, data.max_pixels, targets, sizes)

    def list_view_augments(self, training: TrainingOptions, count: int = 1) -> list[Augment]:
        """Returns the augmentations of the `count` views of a training."""
        return [training.augment or self.recipe.dataset.train_augment] * count

    def read_mask_sizes(self) -> np.ndarray:
        """Returns the (n, 2) widths and heights of the masks of all images."""
        return _read_mask_sizes(str(self.store.path), self.store.hash)

    def build_plan(self, ids: np.ndarray, batch_size: int, seed: int) -> TrainingPlan:
        """Returns the order of the batches of a training.

        A decoding task holds the encoded images of its window, so a window has at most as many as fit the cache.
        """
        stream, total = self.recipe.stream, sum(shard.bytes for shard in self.store.shards)
        per_image = max(total // sum(shard.count for shard in self.store.shards), 1)
        windowed = stream.shuffle == "windowed" or (stream.shuffle == "auto" and total > IMAGE_CACHE_BYTES)
        starts = np.sort(np.concatenate([self.store.list_row_groups(split)[:, 2] for split in self.splits.stored_in]))
        window = min(stream.window, IMAGE_CACHE_BYTES // per_image)
        if stream.shuffle == "lanes" or (stream.shuffle == "auto" and len(ids) >= LANE_PLAN_IMAGES):
            return LanePlan(make_id_set(ids), starts, batch_size, seed, window)
        return BatchPlan(ids, starts, batch_size, seed, window, windowed)

    def iterate_batches(
        self,
        ids: np.ndarray,
        batch_size: int,
        views: Sequence[Augment] | None = None,
        target: TargetKind = "label",
        whole_masks: bool = False,
    ) -> Iterator[Batch]:
        """Yields this worker's part of `ids` once, in order. The default of `views` is the evaluation augmentation.

        The images are streamed, also if trainings keep them on the device. Their views are held, see `HeldViews`.
        """
        loader = self.build_loader(views or [self.recipe.dataset.eval_augment], 0, target, whole_masks)
        for arrays in held_views.iterate_batches(loader, ids, batch_size, self.options):
            yield to_batch(arrays, self.device)


# All annotations are read for it, so it is cached.
@lru_cache(maxsize=4)
def _count_most_boxes(path: str, manifest: str) -> int:
    store = Store.open(Path(path))
    ids = np.arange(sum(store.splits.values()))
    parts = np.array_split(ids, -(-len(ids) // 4096))
    boxes = (found.box_classes for part in parts for found in store.read_annotations(part))
    return max((len(classes) for classes in boxes if classes is not None), default=0)


@lru_cache(maxsize=4)
def _read_mask_sizes(path: str, manifest: str) -> np.ndarray:
    store = Store.open(Path(path))
    ids = np.arange(sum(store.splits.values()))
    parts = np.array_split(ids, -(-len(ids) // 4096))
    masks = (found.mask for part in parts for found in store.read_annotations(part))
    return np.array([read_header_frame(mask).stored for mask in masks if mask is not None])


def _max_boxes(store: Store) -> int:
    """Returns the largest number of boxes of an image, at least 1: the length that boxes are padded to."""
    return max(1, _count_most_boxes(str(store.path), store.hash))


def gather_rows(parts: Sequence[Tensor], total: int) -> Tensor:
    """Gathers the rows that every worker has computed for its part of `total` ids. It is collective.

    `parts` are this worker's rows, batch by batch. Returns (total, ...) in the order of the ids, on every worker.
    """
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

"""Small trainings of every method and task on images of noise, for benchmarks of the training loop."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.stream import LoadingOptions, TrainOrder
from firstlight.pipeline.train import loop
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.learner import Learner
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, batch_requirements
from firstlight.tasks.pretrain.method import TrainingInfo

CASE_CLASSES, CASE_BOXES = 5, 3
CASE_CONVNET: dict[str, Any] = {"name": "convnet", "width": 8, "depth": 3, "norm": "batch"}
# Six blocks of 64 channels.
CASE_VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}


@dataclass(frozen=True)
class TrainingCase:
    """A method or a task with settings that suit small images."""

    name: str
    # The name in `METHODS` or in `TASKS`.
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] = field(default_factory=lambda: CASE_CONVNET)

    @property
    def is_task(self) -> bool:
        return self.kind in TASKS

    def build_learner(self, size: int, images: int, epochs: int, steps: int) -> Learner:
        """Builds the learner for images of `size` x `size`, `images` of which are trained on."""
        torch.manual_seed(0)
        encoder = Encoder(dict(self.encoder), size)
        if self.is_task:
            return TASKS[self.kind](encoder, CASE_CLASSES, **self.options)
        labels = torch.arange(images) % CASE_CLASSES
        info = TrainingInfo(images, epochs, 0, CASE_CLASSES, labels, steps)
        return METHODS[self.kind](encoder, info, **self.options)

    @property
    def num_views(self) -> int:
        """The number of views of an image in a batch."""
        if self.is_task:
            return 1
        method = METHODS[self.kind]
        return batch_requirements(self.kind, method.complete_parameters(self.options)).views


HEADS: dict[str, Any] = {"dim": 16, "hidden": (16,)}
METHOD_TRAININGS = (
    TrainingCase("nat", "nat", {**HEADS, "pool": "avg"}),
    TrainingCase("nat, sparse solver", "nat", {**HEADS, "pool": "avg", "solver": "sparse"}),
    TrainingCase("super_and", "super_and", {"dim": 16, "rounds": 2, "ue_period": 1}),
    TrainingCase("super_and, authors' code", "super_and", {"dim": 16, "rounds": 2, "variant": "reference"}),
    TrainingCase("super_and, sampled", "super_and", {"dim": 16, "rounds": 2, "negatives": 8, "bank_dtype": "bfloat16"}),
    TrainingCase("clustering_locality", "clustering_locality"),
    TrainingCase("dae", "dae"),
    TrainingCase("dae, small blocks", "dae", {"corruption": "small_blocks"}),
    TrainingCase("spatial_contrasting", "spatial_contrasting", {"patch_size": 2}),
    TrainingCase("spatial_contrasting, labels", "spatial_contrasting", {"patch_size": 2, "supervised_weight": 0.5}),
    TrainingCase("simclr", "simclr", HEADS),
    TrainingCase("byol", "byol", HEADS),
    TrainingCase("vicreg", "vicreg", HEADS),
    TrainingCase(
        "dino",
        "dino",
        {"local_views": 2, "prototypes": 32, "hidden": (16,), "bottleneck": 8, "patch_loss": 1.0, "koleo": 0.1},
        CASE_VIT,
    ),
    TrainingCase("mae", "mae", {}, CASE_VIT),
    TrainingCase("lejepa", "lejepa", {"local_views": 2, "hidden": (16,), "directions": 16}),
    TrainingCase("distill", "distill", {"teacher": {"name": "convnet", "width": 8, "depth": 3}}),
    TrainingCase("fixmatch", "fixmatch", {"cutoff": 0.3}),
    TrainingCase("flexmatch", "fixmatch", {"threshold": "flexible", "cutoff": 0.3}),
    TrainingCase("freematch", "fixmatch", {"threshold": "free"}),
)
TASK_TRAININGS = (
    TrainingCase("classify", "classify"),
    TrainingCase("classify_square", "classify_square"),
    TrainingCase("multilabel", "multilabel"),
    TrainingCase("segment", "segment"),
    TrainingCase("detect", "detect", {"anchors": (8, 16), "hidden": 32, "sampled": 16}),
)


def build_case_job(folder: Path, options: Mapping[str, Any], images: int, device: torch.device) -> TrainingJob:
    """Returns a training of `images` images with the keys `options` of a recipe's stage."""
    training = TrainingOptions.model_validate(options)
    plan = BatchPlan(np.arange(images), np.array([0]), training.batch_size, 0, images, False)
    loading = LoadingOptions(on_ray=False, prefetch=1, tasks=1, task_cpus=1.0)
    nothing: Any = None
    return TrainingJob(folder, training, plan, nothing, 0, loading, device, withheld=plan.ids[:0])


def make_noise_batch(case: TrainingCase, size: int, ids: np.ndarray, passes: np.ndarray) -> dict[str, Any]:
    """Returns what the stream gives of (B,) ids: labels of two in three images, and the targets of every task."""
    rng, count = np.random.default_rng((int(ids[0]), int(passes[0]))), len(ids)
    corners = rng.integers(0, size // 2, (count, CASE_BOXES, 2))
    boxes = np.concatenate((corners, corners + size // 3), 2).astype(np.float32)
    classes = rng.integers(0, CASE_CLASSES, (count, CASE_BOXES))
    # An image has one object at least; the other rows may be unused.
    classes[:, 1:][rng.random((count, CASE_BOXES - 1)) < 0.5] = -1
    targets: dict[str, dict[str, Any]] = {
        "present": {"present": rng.integers(-1, 2, (count, CASE_CLASSES)).astype(np.int8)},
        "mask": {"mask": rng.integers(0, CASE_CLASSES, (count, size, size), dtype=np.uint8)},
        "boxes": {"boxes": boxes, "box_classes": classes, "difficult": np.zeros_like(classes, dtype=bool)},
    }
    labels = ids % CASE_CLASSES
    return {
        "id": ids,
        "label": labels if case.is_task else np.where(ids % 3 > 0, labels, -1),
        "pass": passes,
        "views": rng.integers(0, 256, (count, case.num_views, size, size, 3), dtype=np.uint8),
        **(targets.get(TASKS[case.kind].target, {}) if case.is_task else {}),
    }


@contextmanager
def feed_noise(case: TrainingCase, size: int) -> Iterator[None]:
    """Returns a block in which trainings get images of noise instead of those of a store."""

    def open_noise(job: TrainingJob, order: TrainOrder, rows: int) -> tuple[Iterator[dict[str, Any]], list[str]]:
        steps = (batch for index in range(len(order)) for batch in order.list_batches(index))
        return (make_noise_batch(case, size, np.array(ids), np.array(passes)) for ids, passes in steps), []

    with mock.patch.object(loop, "open_batches", open_noise):
        yield

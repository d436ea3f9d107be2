"""Trains the small recipe in this process, to its end or to a step."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.learner import Learner
from tests.support import recipes
from tests.support.state_hash import hash_state


class Stopped(Exception):
    """The training reached the step that it was to stop at."""


def train(folder: Path, store: Store, stop: int | None = None, **changes: Any) -> tuple[str, dict[str, Tensor]]:
    """Trains or continues the small recipe in `folder`, to its end or to step `stop`; returns what `fit_until` does."""
    return fit_until(stop, *build_training(folder, store, **changes))


def train_with_copies(folder: Path, store: Store, steps: Collection[int], **changes: Any) -> str:
    """Trains the small recipe to its end, and copies `folder` to `FOLDER-stop<step>` at some steps.

    A copy is what a training leaves that is stopped there, without the time to train up to there once more.
    It is collective.
    Returns a hash of every bit of the end state.
    """

    def copy_folder(_: int, step: int) -> None:
        if step in steps:
            if rank() == 0:
                shutil.copytree(folder, find_copy(folder, step))
            # A worker that goes on would write its part of the next checkpoint.
            if world_size() > 1:
                dist.barrier()

    return fit_with_hook(copy_folder, *build_training(folder, store, **changes))[0]


def find_copy(folder: Path, step: int) -> Path:
    """Returns where `train_with_copies` copies `folder` at `step`."""
    return folder.with_name(f"{folder.name}-stop{step}")


def build_training(folder: Path, store: Store, **changes: Any) -> tuple[TrainingJob, Learner]:
    """Returns the pretraining of the small recipe."""
    context = StageContext.create(recipes.recipe(folder, **changes), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))
    return job, pretrain_job.build_seeded_method(context, stage, job)


def fit_until(stop: int | None, job: TrainingJob, learner: Learner) -> tuple[str, dict[str, Tensor]]:
    """Trains to the end, or to step `stop`, where `Stopped` is raised.

    Returns a hash of every bit of the end state, and the weights.
    """

    def stop_training(rank: int, step: int) -> None:
        if step == stop:
            raise Stopped

    return fit_with_hook(stop_training, job, learner)


def fit_with_hook(
    hook: Callable[[int, int], None], job: TrainingJob, learner: Learner
) -> tuple[str, dict[str, Tensor]]:
    """Trains to the end, and calls `hook` with the rank and the number of steps after each, before its checkpoint.

    Returns what `fit_until` does.
    """
    failures.fault_hook = hook
    try:
        fit(job, learner)
    finally:
        failures.fault_hook = None
    found, _ = Checkpoints(job.folder / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards]), learner.state_dict()

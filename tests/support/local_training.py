"""Trains the small recipe in this process, to its end or to a step."""

from pathlib import Path
from typing import Any

from torch import Tensor

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.learner import Learner
from tests.support import recipes
from tests.support.state_hash import hash_state


class Stopped(Exception):
    """The training reached the step that it was to stop at."""


def train(folder: Path, store: Store, stop: int | None = None, **changes: Any) -> tuple[str, dict[str, Tensor]]:
    """Trains or continues the small recipe in `folder`, to its end or to step `stop`; returns what `fit_until` does."""
    worker = StageContext.create(recipes.recipe(folder, **changes), store, on_ray=False)
    stage: Any = worker.recipe.stages["pretrain"]
    job = pretrain_job.build_job(worker, stage, StageInstance("pretrain", 3, "f", folder / "job"))
    return fit_until(stop, job, pretrain_job.build_seeded_method(worker, stage, job))


def fit_until(stop: int | None, job: TrainingJob, learner: Learner) -> tuple[str, dict[str, Tensor]]:
    """Trains to the end, or to step `stop`, where `Stopped` is raised.

    Returns a hash of every bit of the end state, and the weights.
    """

    def stop_training(rank: int, step: int) -> None:
        if step == stop:
            raise Stopped

    failures.fault_hook = stop_training
    try:
        fit(job, learner)
    finally:
        failures.fault_hook = None
    found, _ = Checkpoints(job.folder / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards]), learner.state_dict()

"""A pretraining whose learner records the batches it gets, one line a step; also on Ray's workers."""

import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.plan import TrainingPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run import launch
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.learner import Batch, Learner

# step -> ids, passes and labels of the whole batch
Steps = dict[int, dict[str, np.ndarray]]
STEP_S = 0.25
# A file in the folder of a slow training that ends its slowness.
HURRY_FILE = "hurry"


class TracedLearner(Learner):
    """A learner of one weight that writes a file for every process that trains it."""

    def __init__(self, job: TrainingJob) -> None:
        super().__init__()
        self.job, self.weight = job, torch.nn.Parameter(torch.ones(1))
        # The checkpoints contain the step, so that it continues where the training does.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.weight.expand(len(batch.ids)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        row: dict[str, Any] = {"step": int(self.step), "rank": rank(), "world": world_size()}
        row |= {"ids": batch.ids.tolist(), "passes": batch.passes.tolist(), "labels": batch.labels.tolist()}
        with open(self.job.folder / f"trace-{rank()}-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return {"loss": outputs[0].mean()}

    def end_step(self) -> None:
        self.step += 1
        super().end_step()


class SlowTracedLearner(TracedLearner):
    """Takes a quarter of a second for a step until `HURRY_FILE` is in the folder of the training."""

    def end_step(self) -> None:
        if not (self.job.folder / HURRY_FILE).exists():
            time.sleep(STEP_S)
        super().end_step()


def run_traced(context: StageContext, stage: Any, instance: StageInstance, learner: type[TracedLearner]) -> None:
    """Runs a pretrain stage with `learner` in the place of its method."""
    job = pretrain_job.build_job(context, stage, instance)
    fit(job, learner(job))


def launch_traced(recipe: Recipe, store: Store, instance: StageInstance, slowly: bool = False) -> None:
    """Launches a pretraining with a traced learner on the workers of the recipe."""
    with mock.patch.object(launch, "_train_function", _train_slowly if slowly else _train):
        launch.launch_instances(recipe, store, [instance])


def _train(config: dict[str, Any]) -> dict[str, Any]:
    return _train_on_worker(config, TracedLearner)


def _train_slowly(config: dict[str, Any]) -> dict[str, Any]:
    return _train_on_worker(config, SlowTracedLearner)


def _train_on_worker(config: dict[str, Any], learner: type[TracedLearner]) -> dict[str, Any]:
    def run(kind: Any, context: StageContext, stage: Any, instance: StageInstance) -> None:
        run_traced(context, stage, instance, learner)

    with mock.patch.object(pretrain.PretrainStage, "run", run):
        return launch._train_function(config)


def read_steps(folder: Path) -> Steps:
    """Returns what all processes recorded together. Asserts that a step that was repeated had the same images."""
    parts: dict[int, dict[tuple[int, int], dict[str, Any]]] = {}
    for file in sorted(folder.glob("trace-*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            here = parts.setdefault(row["step"], {})
            assert here.setdefault((row["world"], row["rank"]), row) == row, "repeated with other images"
    out: Steps = {}
    for step, here in parts.items():
        for size in {size for size, _ in here}:
            ranks = [here[size, k] for k in range(size) if (size, k) in here]
            # Otherwise the other ranks were killed before this step.
            if len(ranks) == size:
                whole = {key: np.concatenate([row[key] for row in ranks]) for key in ("ids", "passes", "labels")}
                assert all(np.array_equal(out.setdefault(step, whole)[key], value) for key, value in whole.items())
    return out


def assert_planned(steps: Steps, plan: TrainingPlan, count: int) -> None:
    """Asserts that exactly the first `count` steps of the plan were made, with their images in their passes."""
    assert sorted(steps) == list(range(count))
    for step, row in steps.items():
        epoch, place = divmod(step, plan.steps)
        assert np.array_equal(row["ids"], plan.epoch(epoch)[place])
        assert np.array_equal(row["passes"], plan.passes(epoch)[place])

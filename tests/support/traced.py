"""A training whose learner writes down what it is shown, a line a step: a work that `launch` can do, on Ray too."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.data.plan import Batches
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.job import Job
from firstlight.pipeline.train.loop import fit
from firstlight.tasks.collective import rank, world
from firstlight.tasks.learner import Batch, Learner

Steps = dict[int, dict[str, np.ndarray]]  # step -> ids, passes and labels of the whole batch


class Traced(Learner):
    """Has one weight, and a file for every process that trains it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.weight = job, torch.nn.Parameter(torch.ones(1))
        self.register_buffer(
            "step", torch.zeros((), dtype=torch.int64)
        )  # in the checkpoints: it goes on where the training does

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.weight.expand(len(batch.ids)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        row: dict[str, Any] = {"step": int(self.step), "rank": rank(), "world": world()}
        row |= {"ids": batch.ids.tolist(), "passes": batch.passes.tolist(), "labels": batch.labels.tolist()}
        with open(self.job.folder / f"trace-{rank()}-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return {"loss": outputs[0].mean()}

    def end_step(self) -> None:
        self.step += 1
        super().end_step()


def work(worker: Worker, stage: Any, instance: Instance) -> None:
    job = pretrain.job(worker, stage, instance)
    fit(job, Traced(job))


def shown(folder: Path) -> Steps:
    """What all processes together wrote down; a step that was made again was made of the same images."""
    parts: dict[int, dict[tuple[int, int], dict[str, Any]]] = {}
    for file in sorted(folder.glob("trace-*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            here = parts.setdefault(row["step"], {})
            assert here.setdefault((row["world"], row["rank"]), row) == row, "made again, of other images"
    out: Steps = {}
    for step, here in parts.items():
        for size in {size for size, _ in here}:
            ranks = [here[size, k] for k in range(size) if (size, k) in here]
            if len(ranks) == size:  # else the others were killed before they came to it
                whole = {key: np.concatenate([row[key] for row in ranks]) for key in ("ids", "passes", "labels")}
                assert all(np.array_equal(out.setdefault(step, whole)[key], value) for key, value in whole.items())
    return out


def assert_shown(steps: Steps, plan: Batches, epochs: int) -> None:
    """Every step of so many epochs, and its images in their passes."""
    assert sorted(steps) == list(range(epochs * plan.steps))
    for step, row in steps.items():
        epoch, place = divmod(step, plan.steps)
        assert np.array_equal(row["ids"], plan.epoch(epoch)[place])
        assert np.array_equal(row["passes"], plan.passes(epoch)[place])

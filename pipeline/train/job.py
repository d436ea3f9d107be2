"""A training as the loop is given it, and its batches as they come from the stream."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.recipe import Training
from firstlight.pipeline.data.plan import Batches
from firstlight.pipeline.data.stream import Loader, Options
from firstlight.tasks.collective import rank, world
from firstlight.tasks.learner import Batch


@dataclass(frozen=True)
class Job:
    """One training: what to train on, how, and where its files go (a folder that all workers see)."""

    folder: Path
    training: Training
    plan: Batches
    loader: Loader
    seed: int
    options: Options
    device: torch.device
    withheld: np.ndarray  # ids whose labels the learner must not see, sorted
    begin: Path | None = None  # the folder of the training that it goes on from, where it has no checkpoint of its own
    until: int | None = None  # epochs after which it pauses

    @property
    def total_steps(self) -> int:
        return self.training.epochs * self.plan.steps

    @property
    def pause(self) -> int | None:
        """Steps after which it pauses."""
        return self.until * self.plan.steps if self.until is not None and self.until < self.training.epochs else None


def to_batch(arrays: dict[str, Any], device: torch.device, job: Job | None = None, step: int = 0) -> Batch:
    """uint8 (B, V, S, S, 3), from the wire or on the device -> float views (B, 3, S, S) in 0..1 on the device.

    `job`: None outside of a training. `step` counts from 0 over the whole training: it tells which pass each image is in.
    """
    views = arrays["views"]
    pixels = (views if isinstance(views, Tensor) else torch.from_numpy(np.require(views, requirements="W"))).to(
        device, non_blocking=True
    )
    layout = torch.channels_last if job is not None and job.training.channels_last else torch.contiguous_format
    floats = tuple(v.permute(0, 3, 1, 2).float().div_(255.0).contiguous(memory_format=layout) for v in pixels.unbind(1))
    ids, labels = np.array(arrays["id"]), np.array(arrays["label"])
    rows, passes = np.full_like(ids, -1), np.zeros_like(ids)
    if job is not None:
        rows = np.searchsorted(job.plan.ids, ids)
        assert np.array_equal(job.plan.ids[rows], ids), (
            "tables do not look at their keys: on a GPU that would wait for it"
        )
        labels[np.isin(ids, job.withheld)] = -1
        passes = job.plan.slice(*divmod(step, job.plan.steps), rank(), world())[1]
    columns = [
        torch.from_numpy(np.require(column, requirements="W")).to(device) for column in (ids, rows, labels, passes)
    ]
    others = {name: value for name, value in arrays.items() if name not in ("id", "label", "views")}
    targets = {name: torch.from_numpy(np.require(value, requirements="W")).to(device) for name, value in others.items()}
    return Batch(columns[0], columns[1], columns[2], floats, columns[3], targets)

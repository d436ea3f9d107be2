"""A training with its options, as the training loop takes it, and batches of the stream as tensors."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.loader import Loader, list_view_columns
from firstlight.pipeline.data.plan import TrainingPlan
from firstlight.pipeline.data.stream import LoadingOptions
from firstlight.pipeline.train.selection import SelectionOptions
from firstlight.tasks.device.copies import send_array
from firstlight.tasks.device.pixel_levels import scale_pixels, send_pixels
from firstlight.tasks.learner import Batch


@dataclass(frozen=True)
class TrainingJob:
    """One training: its images, its options, and the folder of its files, which all workers see.

    `withheld` are the sorted ids whose labels the learner must not see. `warm_start` is the folder of another training
    that this one continues if it has no checkpoint yet. `pause_after` is the length after which it pauses, in the unit
    of its own length. `selection` says how its weights are judged on held-out images; None: they are not.
    """

    folder: Path
    training: TrainingOptions
    plan: TrainingPlan
    loader: Loader
    seed: int
    options: LoadingOptions
    device: torch.device
    withheld: np.ndarray
    warm_start: Path | None = None
    pause_after: int | None = None
    selection: SelectionOptions | None = None

    @property
    def total_steps(self) -> int:
        return self.training.length.count_steps(self.plan.steps)

    @property
    def num_epochs(self) -> int:
        """Number of epochs that begin. The last may be partial."""
        return self.training.length.count_epochs(self.plan.steps)

    @property
    def pause_step(self) -> int | None:
        """Number of steps after which the training pauses, None if it runs to its end."""
        length, pause = self.training.length, self.pause_after
        if pause is None or pause >= length.count:
            return None
        return replace(length, count=pause).count_steps(self.plan.steps)


def to_batch(arrays: dict[str, Any], device: torch.device, job: TrainingJob | None = None) -> Batch:
    """Converts (B, V, S, S, C) levels of each group of views to float views (B, C, S, S) in 0..1 on the device.

    The levels come from the wire or are on the device. The views are in the order of the groups.

    `job` is None outside of a training.

    Raises:
        ValueError: an image is in the batch twice (a defect, never a user's mistake). Tables do not look at their rows:
            on a GPU that would wait for it.
    """
    names = list_view_columns(arrays)
    layout = torch.channels_last if job is not None and job.training.channels_last else torch.contiguous_format
    floats = tuple(scale_pixels(view, layout) for name in names for view in send_pixels(arrays[name], device).unbind(1))
    ids, labels, passes = (np.array(arrays[name]) for name in ("id", "label", "pass"))
    rows = np.full_like(ids, -1)
    if job is not None:
        rows = _find_rows(ids, job.plan)
        labels[np.isin(ids, job.withheld)] = -1
    columns = [send_array(column, device) for column in (ids, rows, labels, passes)]
    others = {name: value for name, value in arrays.items() if name not in ("id", "label", "pass", *names)}
    targets = {name: send_array(value, device) for name, value in others.items()}
    return Batch(columns[0], columns[1], columns[2], floats, columns[3], targets)


def _find_rows(ids: np.ndarray, plan: TrainingPlan) -> np.ndarray:
    """Returns the positions of (B,) ids among the sorted ids that are trained on.

    Raises:
        ValueError: one is not among them, or twice in the batch; names it.
    """
    rows = plan.find_positions(ids)
    foreign = rows < 0
    if foreign.any():
        raise ValueError(f"id {ids[foreign][0]} of a batch is none of the {plan.num_ids} images that are trained on")
    ordered = np.sort(ids)
    again = ordered[1:] == ordered[:-1]
    if again.any():
        raise ValueError(f"id {ordered[1:][again][0]} is in a batch twice")
    return rows

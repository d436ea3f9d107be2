"""The scores of fine-tuned tasks, and how a result holds them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.stages.finetuning.views import list_scored_views
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.multilabel import mean_without_nan
from firstlight.tasks.downstream.task import Scores, Task

# The scores of a training by their names, as a result holds them: None where the images gave none.
ResultScores = Mapping[str, float | list[float | None] | None]


@torch.no_grad()
def score_tasks(
    context: StageContext, stage: Finetune, tasks: Mapping[str, Task], ids: np.ndarray
) -> dict[str, ResultScores]:
    """Scores each task on those of `ids` whose target is known. It is collective; every image is decoded once.

    A network under several names, which two arms share, is scored once.
    """
    target = TASKS[stage.task.name].target
    ids = context.splits.with_target(ids, target)
    seen: dict[Task, list[tuple[Tensor, ...]]] = {task: [] for task in tasks.values()}
    views = list_scored_views(context, stage)
    size, whole = max(max(stage.batch_size, 256) // len(views), 1), stage.scored_pixels == "image"
    for batch in context.iterate_batches(ids, size, views, target, whole):
        for task, rows in seen.items():
            rows.append(task.eval().observe(batch))
    gathered = {
        task: tuple(gather_rows(column, len(ids)) for column in zip(*rows, strict=True)) for task, rows in seen.items()
    }
    scores = {
        task: _replace_nan(add_group_scores(stage, task.score(rows), context.store.classes))
        for task, rows in gathered.items()
    }
    return {name: scores[task] for name, task in tasks.items()}


def add_group_scores(stage: Finetune, scores: Scores, classes: tuple[str, ...]) -> Scores:
    """Adds the task's measure of each group of classes to `scores`: its mean over the group's classes that occur."""
    of = TASKS[stage.task.name].by_class
    if not stage.class_groups or of is None:
        return scores
    values = scores[of]
    assert isinstance(values, list)
    each = dict(zip(classes, values, strict=True))
    groups = zip(stage.score_names[1:], stage.class_groups.values(), strict=True)
    return {**scores, **{name: mean_without_nan([each[member] for member in members]) for name, members in groups}}


def _replace_nan(scores: Scores) -> dict[str, Any]:
    """Replaces NaN, the score of a class that does not occur or of images that give none, by None, which JSON has."""
    found: dict[str, Any] = {}
    for name, value in scores.items():
        values = [None if math.isnan(v) else v for v in (value if isinstance(value, list) else [value])]
        found[name] = values if isinstance(value, list) else values[0]
    return found


def read_number(value: float | None) -> float:
    """Returns a score of a result; NaN where the images gave none."""
    return math.nan if value is None else float(value)


def count_scored_classes(stage: Finetune, result: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns how many classes the measure is a mean over, and of how many; None if it is no mean over classes."""
    of = TASKS[stage.task.name].by_class
    scores = result[stage.compared_arms[0]]["scores"]
    values = scores.get("test", scores["val"]).get(of) if of is not None else None
    return None if values is None else (sum(value is not None for value in values), len(values))

"""Scores of a fine-tuning that are found before its result is written, maybe by other processes, each of which scores
some of its trainings. They lie in the folders of the trainings until then.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from firstlight.pipeline.records import DamagedRecord, RecordShape, read_json_record, write_sealed_json
from firstlight.pipeline.stages.finetuning.scoring import ResultScores, score_tasks
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.collective import world_size
from firstlight.tasks.downstream.task import Task

ScoredSplit = Literal["val", "test"]


class _KeptShape(RecordShape):
    scores: dict[str, float | list[float | None] | None]


KEPT_SHAPE = TypeAdapter(_KeptShape)


def find_scores(
    context: StageContext, stage: Finetune, instance: StageInstance, tasks: Mapping[str, Task], split: ScoredSplit
) -> dict[str, ResultScores]:
    """Returns the scores on a split of each fine-tuned network: those that are kept, or that it finds now. Collective.

    `tasks`: the networks by the names of their trainings.
    """
    known = dict[Task, ResultScores]()
    for name, task in tasks.items():
        kept = read_kept_scores(instance, name, split)
        # Two trainings may be one, whose scores are kept once.
        if kept is not None:
            known[task] = kept
    missing = {name: task for name, task in tasks.items() if task not in known}
    ids = {"val": context.splits.val, "test": context.splits.test}[split]
    found = score_tasks(context, stage, missing, ids) if missing else {}
    return {name: known[task] if task in known else found[name] for name, task in tasks.items()}


def keep_scores(
    context: StageContext, stage: Finetune, instance: StageInstance, name: str, task: Task, split: ScoredSplit
) -> None:
    """Scores a fine-tuned network on a split, unless that was done, and keeps the scores in its training's folder."""
    scores = find_scores(context, stage, instance, {name: task}, split)[name]
    file = _name_kept_file(instance, name, split)
    # A training that another stage has done has no folder here yet.
    file.parent.mkdir(parents=True, exist_ok=True)
    write_sealed_json(file, {"scores": scores})


def read_kept_scores(instance: StageInstance, name: str, split: ScoredSplit) -> ResultScores | None:
    """Returns the scores of a training that are kept, None if there are none, or their file is damaged."""
    # Several workers would have to agree on whether there is a file.
    if world_size() > 1:
        return None
    try:
        kept = read_json_record(_name_kept_file(instance, name, split), KEPT_SHAPE)
    except DamagedRecord:
        return None
    return None if kept is None else kept["scores"]


def forget_scores(instance: StageInstance, names: Iterable[str]) -> None:
    """Removes what is kept of trainings, once nobody needs it."""
    for name in names:
        for split in ("val", "test"):
            _name_kept_file(instance, name, split).unlink(missing_ok=True)


def _name_kept_file(instance: StageInstance, name: str, split: str) -> Path:
    return instance.folder / name / f"{split}_scores.json"

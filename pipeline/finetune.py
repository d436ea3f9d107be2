"""Stage: a downstream task from the pretrained encoder, and from scratch: the same network, images, epochs and choice of settings.

Both arms try the same learning rates; each is chosen on held-out data, then the test split is read once with the chosen one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import figures
from pipeline.config import Finetune, arguments
from pipeline.durable import write_json
from pipeline.fit import Job, fit
from pipeline.handover import load_encoder
from pipeline.labelled import write_labelled
from pipeline.metrics import METRICS, TAILS, read_metrics
from pipeline.stage import RESULT, Instance
from pipeline.tracking import Tracking
from pipeline.worker import Worker, gather_rows
from tasks.collective import barrier, rank
from tasks.downstream import TASKS
from tasks.downstream.task import Task
from tasks.encoders import Encoder

ARMS = ("pretrained", "scratch")


def rates(stage: Finetune) -> tuple[float, ...]:
    return stage.learning_rates or (stage.optimizer.lr,)


def candidates(stage: Finetune) -> dict[str, tuple[str, float]]:
    """Name of each training -> its arm and learning rate."""
    return {f"{arm}-lr{rate:g}": (arm, rate) for arm in ARMS for rate in rates(stage)}


def work(worker: Worker, stage: Finetune, instance: Instance) -> None:
    """Leave `result.json` in the instance's folder. Runs on every worker."""
    tasks: dict[str, Task] = {}
    for name, (arm, rate) in candidates(stage).items():
        tasks[name] = _build(worker, stage, instance, arm)
        fit(_job(worker, stage, instance, instance.folder / name, rate), tasks[name])
    held_out = _accuracies(worker, stage, tasks, worker.splits.val)
    best = {arm: max((n for n, (its, _) in candidates(stage).items() if its == arm), key=lambda n: held_out[n]) for arm in ARMS}
    tested = _accuracies(worker, stage, {name: tasks[name] for name in best.values()}, worker.splits.test)
    result: dict[str, Any] = {"labels": len(_few(worker, stage, instance)), "tried": held_out}
    for arm, name in best.items():
        result[arm] = {"val": held_out[name], "test": tested[name], "lr": candidates(stage)[name][1]}
    if rank() == 0:
        write_json(instance.folder / RESULT, result)
    barrier()


def _few(worker: Worker, stage: Finetune, instance: Instance) -> np.ndarray:
    return worker.splits.few(stage, instance.seed)


def _job(worker: Worker, stage: Finetune, instance: Instance, folder: Path, rate: float) -> Job:
    training = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"lr": rate})})
    plan = worker.plan(_few(worker, stage, instance), stage.batch_size, instance.seed)
    loader = worker.loader(worker.views(stage), instance.seed)
    return Job(folder, training, plan, loader, instance.seed, worker.options, worker.device, withheld=plan.ids[:0])


def _build(worker: Worker, stage: Finetune, instance: Instance, arm: str) -> Task:
    """The task on the pretrained or a fresh encoder; all fresh weights are drawn from the seed, so the arms share their head's."""
    size = worker.recipe.dataset.image_size
    torch.manual_seed(instance.seed)
    encoder = Encoder(worker.recipe.encoder.model_dump(), size)
    if arm == "pretrained":
        assert instance.encoder is not None
        encoder.load_state_dict(load_encoder(instance.encoder, size).state_dict())
    return TASKS[stage.task.name](encoder, len(worker.store.classes), **arguments(stage.task))


@torch.no_grad()
def _accuracies(worker: Worker, stage: Finetune, tasks: dict[str, Task], ids: np.ndarray) -> dict[str, float]:
    """Share of the labelled `ids` that each task predicts right. Collective; the images are decoded once."""
    ids = ids[worker.splits.labels[ids] >= 0]
    right: dict[str, list[Tensor]] = {name: [] for name in tasks}
    for batch in worker.sweep(ids, max(stage.batch_size, 256)):
        for name, task in tasks.items():
            right[name].append((task.eval().predict(batch.views[0]) == batch.labels).double())
    return {name: float(gather_rows(rows, len(ids)).mean()) for name, rows in right.items()}


def files(stage: Finetune, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / name / METRICS, f"{instance.label} {name}", f"{name}/") for name in candidates(stage)]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Finetune, instance: Instance) -> None:
    """Scores, learning curves, and which images were learned from, into the MLflow run. Runs on the driver."""
    result = instance.result
    assert result is not None
    for arm in ARMS:
        tracking.numbers(run_id, {key: result[arm][key] for key in ("val", "test", "lr")}, f"{arm}/")
        rows = read_metrics(instance.folder / f"{arm}-lr{result[arm]['lr']:g}" / METRICS)
        tracking.client.log_figure(run_id, figures.curves(rows), f"figures/curves_{arm}.png")
    tails = instance.folder / next(iter(candidates(stage))) / TAILS  # of all candidates: they have one plan
    for file in (write_labelled(worker.store, _few(worker, stage, instance), instance.folder), *([tails] if tails.exists() else [])):
        tracking.client.log_artifact(run_id, str(file))
    tracking.client.log_dict(run_id, result, "finetune.json")

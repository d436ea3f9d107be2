"""The trainings of a fine-tuning, one after the other."""

import hashlib

import torch

from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.stages.finetuning.arms import build_arm_task
from firstlight.pipeline.stages.finetuning.candidates import list_candidates
from firstlight.pipeline.stages.finetuning.job import build_finetune_job
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, append_row
from firstlight.tasks.collective import rank
from firstlight.tasks.downstream.task import Task


def train_candidates(context: StageContext, stage: Finetune, instance: StageInstance) -> dict[str, Task]:
    """Trains every candidate, and returns the fine-tuned networks by their names. Collective.

    Arms that start from the same network, as `pretrained` and `given` do where no step made the given weights better,
    are trained once: the second training has the same images, seed and rate, and would repeat every bit of the first.
    """
    tasks, trained = dict[str, Task](), dict[tuple[float, str], str]()
    for name, (arm, rate) in list_candidates(stage).items():
        folder, task = instance.folder / name, build_arm_task(context, stage, instance, arm)
        twin = trained.setdefault((rate, _hash_weights(task)), name)
        if twin == name:
            fit(build_finetune_job(context, stage, instance, folder, rate), task)
            tasks[name] = task
            continue
        tasks[name] = tasks[twin]
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / METRICS_FILE, (instance.folder / twin / METRICS_FILE).read_bytes())
        append_row(folder, {"note": f"{name} starts from the same network as {twin}: they are one training"})
    return tasks


def _hash_weights(task: Task) -> str:
    """Returns a sha256 over every bit of a network's weights and buffers, which are equal on all workers."""
    found = hashlib.sha256()
    for name, value in sorted(task.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

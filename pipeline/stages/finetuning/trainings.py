"""The trainings of a fine-tuning: one after the other, or some of them in other processes before."""

from itertools import takewhile
from pathlib import Path

from firstlight.pipeline.config.load import hash_json
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.stages.finetuning.arms import build_arm_task
from firstlight.pipeline.stages.finetuning.candidates import list_candidates
from firstlight.pipeline.stages.finetuning.job import build_finetune_job
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.shared_work import find_shared_folder, hash_weights, list_shared_facts, share_folder
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, append_row
from firstlight.tasks.collective import rank
from firstlight.tasks.downstream.task import Task

# Keys of the section that say what is trained besides, not how.
CANDIDATE_KEYS = frozenset({"encoder", "arms", "learning_rates", "register_as"})


def train_candidates(context: StageContext, stage: Finetune, instance: StageInstance) -> dict[str, Task]:
    """Trains every candidate, and returns the fine-tuned networks by their names. It is collective.

    A training is decided by its options, images, seed, rate and the network that it starts from. Two for which these
    are equal are one training, which is done once: arms of this stage (`pretrained` is `given` where no step made the
    given weights better), and arms of several stages of a recipe (`scratch` has the same weights in each of them).
    """
    tasks, trained = dict[str, Task](), dict[str, str]()
    for name in list_candidates(stage):
        folder, (task, key) = instance.folder / name, _build_candidate(context, stage, instance, name)
        twin = trained.setdefault(key, name)
        if twin != name:
            tasks[name] = tasks[twin]
            _adopt_curve(folder, instance.folder / twin, f"starts from the same network as {twin}")
            continue
        other = _train(context, stage, instance, name, task, key)
        tasks[name] = task
        if other != folder:
            same = f"{other.parent.name}/{other.name}"
            _adopt_curve(folder, other, f"has the images, settings and first weights of {same}")
    return tasks


def train_candidate(context: StageContext, stage: Finetune, instance: StageInstance, name: str) -> Task | None:
    """Trains one candidate, which `train_candidates` then finds finished, on whatever process. Collective.

    Returns the fine-tuned network. Nothing is done for a candidate that is the same training as one before it: None.
    """
    candidates = list_candidates(stage)
    task, key = _build_candidate(context, stage, instance, name)
    before = takewhile(lambda other: other != name, candidates)
    # With another rate it is another training.
    same_rate = [other for other in before if candidates[other][1] == candidates[name][1]]
    if any(_build_candidate(context, stage, instance, other)[1] == key for other in same_rate):
        return None
    _train(context, stage, instance, name, task, key)
    return task


def _build_candidate(context: StageContext, stage: Finetune, instance: StageInstance, name: str) -> tuple[Task, str]:
    """Returns the network that a candidate starts from, and the hash of all that decides its training."""
    arm, rate = list_candidates(stage)[name]
    task = build_arm_task(context, stage, instance, arm)
    facts = list_shared_facts(instance, CANDIDATE_KEYS)
    return task, hash_json({"rate": rate, "weights": hash_weights(task), **facts})


def _train(context: StageContext, stage: Finetune, instance: StageInstance, name: str, task: Task, key: str) -> Path:
    """Trains a candidate in place, or loads it if the training is finished. Returns the folder of the training."""
    own, shared = instance.folder / name, find_shared_folder(instance, key)
    folder = shared or own
    fit(build_finetune_job(context, stage, instance, folder, list_candidates(stage)[name][1]), task)
    if folder == own:
        share_folder(instance, key, folder)
    return folder


def _adopt_curve(folder: Path, trained: Path, reason: str) -> None:
    """Copies the logged numbers of the training in the folder `trained`, with a note why they are also those of
    `folder`.
    """
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / METRICS_FILE, (trained / METRICS_FILE).read_bytes())
    append_row(folder, {"note": f"{folder.name} {reason}: they are one training"})

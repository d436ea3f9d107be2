"""Stage: a downstream task from the pretrained encoder, and from scratch: the same network, images, epochs and choice of settings.

All arms try the same learning rates; each is chosen on held-out data, then the test split is read once with the chosen one.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.recipe import Augment, Finetune, Recipe, arguments, ten_crops
from firstlight.pipeline.data.labelled import write_labelled
from firstlight.pipeline.data.splits import spread
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_atomically, write_json
from firstlight.pipeline.report import curves, figures
from firstlight.pipeline.stages.artifacts import load_decoder, load_encoder
from firstlight.pipeline.stages.stage import RESULT, Instance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.train.context import Worker, gather_rows
from firstlight.pipeline.train.job import Job, to_batch
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS, TAILS, read_metrics
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.multilabel import mean_known
from firstlight.tasks.downstream.task import Scores, Task
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.lsuv import lsuv

KEY = 100  # characters of a class's name in a key of MLflow, which takes 250 in all
SHOWN, LOOKED_AT = 4, 64  # test images in a picture; training images that `lsuv` scales by


def rates(stage: Finetune) -> tuple[float, ...]:
    return stage.learning_rates or (stage.optimizer.lr,)


def candidates(stage: Finetune) -> dict[str, tuple[str, float]]:
    """Name of each training -> its arm and learning rate."""
    return {f"{arm}-lr{rate:g}": (arm, rate) for arm in stage.arms for rate in rates(stage)}


def work(worker: Worker, stage: Finetune, instance: Instance) -> None:
    """Leave `result.json` and pictures in the instance's folder. Runs on every worker."""
    tasks: dict[str, Task] = {}
    for name, (arm, rate) in candidates(stage).items():
        tasks[name] = _build(worker, stage, instance, arm)
        fit(_job(worker, stage, instance, instance.folder / name, rate), tasks[name])
    measure = TASKS[stage.task.name].measure
    held_out = _scores(worker, stage, tasks, worker.splits.val)
    best = {
        arm: max((n for n, (its, _) in candidates(stage).items() if its == arm), key=lambda n: held_out[n][measure])
        for arm in stage.arms
    }
    chosen = {name: tasks[name] for name in best.values()}
    scored = {
        "val": held_out,
        **({"test": _scores(worker, stage, chosen, worker.splits.test)} if worker.recipe.score_test else {}),
    }
    result: dict[str, Any] = {
        "labels": len(_few(worker, stage, instance)),
        "tried": {name: scores[measure] for name, scores in held_out.items()},
    }
    for arm, name in best.items():
        scores = {part: found[name] for part, found in scored.items()}
        result[arm] = {
            **{part: found[measure] for part, found in scores.items()},
            "lr": candidates(stage)[name][1],
            "scores": scores,
        }
    if rank() == 0:
        for arm, name in best.items():
            _save_pictures(worker, stage, tasks[name], instance.folder / f"{arm}.safetensors")
        write_json(instance.folder / RESULT, result)
    barrier()


def _few(worker: Worker, stage: Finetune, instance: Instance) -> np.ndarray:
    return worker.splits.labelled_subset(stage, instance.seed, TASKS[stage.task.name].target)


def _job(worker: Worker, stage: Finetune, instance: Instance, folder: Path, rate: float) -> Job:
    training = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"lr": rate})})
    plan = worker.plan(_few(worker, stage, instance), stage.batch_size, instance.seed)
    loader = worker.loader(worker.views(stage), instance.seed, TASKS[stage.task.name].target)
    return Job(folder, training, plan, loader, instance.seed, worker.options, worker.device, withheld=plan.ids[:0])


def _build(worker: Worker, stage: Finetune, instance: Instance, arm: str) -> Task:
    """The task on the pretrained or a fresh encoder; all fresh weights are drawn from the seed, so the arms share their head's."""
    size, spec = worker.recipe.dataset.image_size, worker.recipe.encoder.model_dump()
    torch.manual_seed(instance.seed)
    encoder = Encoder({**spec, "init": arm} if arm in ("gaussian", "he", "xavier") else spec, size)
    if arm == "lsuv":
        lsuv(encoder, _first_images(worker, stage, instance))
    if arm.startswith("pretrained"):
        assert instance.encoder is not None
        encoder.load_state_dict(load_encoder(instance.encoder, size).state_dict())
    torch.manual_seed(instance.seed + 1)  # not where the encoder's weights ended: lsuv has drawn more
    task = TASKS[stage.task.name](encoder, len(worker.store.classes), **arguments(stage.task))
    if arm == "pretrained_decoder":
        assert instance.beside is not None
        task.start_from({"decoder": load_decoder(instance.beside)})
    return task


def check_decoder(decoder: Decoder, stage: Finetune, recipe: Recipe, where: str) -> None:
    """A pretrained decoder must have its place in the task.

    Raises:
        UserError: the task has none, or one of another shape.
    """
    encoder = Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size)
    try:
        TASKS[stage.task.name](encoder, 2, **arguments(stage.task)).start_from({"decoder": decoder})
    except ValueError as error:
        raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None


def _first_images(worker: Worker, stage: Finetune, instance: Instance) -> Tensor:
    """(n, 3, S, S) training images as the evaluation crops them, the same on every worker."""
    return _batch(worker, stage, _few(worker, stage, instance)[:LOOKED_AT]).views[0].cpu()


def _batch(worker: Worker, stage: Finetune, ids: np.ndarray) -> Batch:
    loader = worker.loader([worker.recipe.dataset.eval_augment], 0, TASKS[stage.task.name].target)
    return to_batch(loader.once(ids), worker.device)


def views_of_test(worker: Worker, stage: Finetune) -> list[Augment]:
    """What is made of a held-out or a test image: its answers are averaged."""
    if stage.test_crops == 1:
        return [worker.recipe.dataset.eval_augment]
    return ten_crops(stage.test_scale) if stage.test_crop == "corners" else worker.views(stage, stage.test_crops)


@torch.no_grad()
def _scores(worker: Worker, stage: Finetune, tasks: dict[str, Task], ids: np.ndarray) -> dict[str, Scores]:
    """What each task scores on those of `ids` whose answer is known. Collective; the images are decoded once."""
    target = TASKS[stage.task.name].target
    ids = worker.splits.with_target(ids, target)
    seen: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in tasks}
    for batch in worker.sweep(
        ids, max(stage.batch_size, 256) // stage.test_crops, views_of_test(worker, stage), target
    ):
        for name, task in tasks.items():
            seen[name].append(task.eval().observe(batch))
    gathered = {
        name: tuple(gather_rows(column, len(ids)) for column in zip(*rows, strict=True)) for name, rows in seen.items()
    }
    return {
        name: _plain(with_groups(stage, tasks[name].score(rows), worker.store.classes))
        for name, rows in gathered.items()
    }


def with_groups(stage: Finetune, scores: Scores, classes: tuple[str, ...]) -> Scores:
    """`scores`, and the task's measure over each group of classes: its mean over those that the set has."""
    of = TASKS[stage.task.name].by_class
    if not stage.class_groups or of is None:
        return scores
    values = scores[of]
    assert isinstance(values, list)
    each = dict(zip(classes, values, strict=True))
    groups = zip(stage.measures[1:], stage.class_groups.values(), strict=True)
    return {**scores, **{name: mean_known([each[member] for member in members]) for name, members in groups}}


def _plain(scores: Scores) -> dict[str, Any]:
    """NaN, of classes that are nowhere present, as None: what JSON has."""
    lists = {
        name: [None if math.isnan(v) else v for v in value] for name, value in scores.items() if isinstance(value, list)
    }
    return {**scores, **lists}


@torch.no_grad()
def _save_pictures(worker: Worker, stage: Finetune, task: Task, file: Path) -> None:
    """What the task has to show of test images, or held-out ones where those are left alone."""
    ids = worker.splits.with_target(worker.splits.test if worker.recipe.score_test else worker.splits.val, task.target)
    chosen = spread(ids, SHOWN)
    shown = task.eval().pictures(_batch(worker, stage, chosen)) if len(chosen) else {}
    if shown:
        write_atomically(file, save_tensors({caption: image.cpu().contiguous() for caption, image in shown.items()}))


def files(stage: Finetune, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / name / METRICS, f"{instance.label} {name}", f"{name}/") for name in candidates(stage)]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Finetune, instance: Instance) -> None:
    """Scores, learning curves, pictures, and which images were learned from, into the MLflow run. Runs on the driver."""
    result, client = instance.result, tracking.client
    assert result is not None
    album = Album(tracking, run_id, instance.folder)
    of = "test" if worker.recipe.score_test else "held-out"
    for arm in stage.arms:
        tracking.numbers(run_id, {key: value for key, value in result[arm].items() if key != "scores"}, f"{arm}/")
        for part, scores in result[arm]["scores"].items():
            tracking.numbers(run_id, _named(scores, worker.store.classes), f"{arm}/{part}_")
        rows = read_metrics(instance.folder / f"{arm}-lr{result[arm]['lr']:g}" / METRICS)
        album.add(f"curves_{arm}", curves.loss(rows), f"loss, {arm}, with the learning rate that was chosen")
        pictures = instance.folder / f"{arm}.safetensors"
        if pictures.exists():
            told = f"{of} images, {arm}"
            album.add(f"predicted_{arm}", figures.rows(load_tensors(pictures.read_bytes()), told), told)
    tails = instance.folder / next(iter(candidates(stage))) / TAILS  # of all candidates: they have one plan
    for file in (
        write_labelled(worker.store, _few(worker, stage, instance), instance.folder),
        *([tails] if tails.exists() else []),
    ):
        client.log_artifact(run_id, str(file))
    client.log_dict(run_id, result, "finetune.json")


def _named(scores: dict[str, Any], classes: tuple[str, ...]) -> dict[str, float]:
    """Lists by class as a number for each class that has one."""
    single = {name: value for name, value in scores.items() if not isinstance(value, list)}
    lists = {name: value for name, value in scores.items() if isinstance(value, list)}
    keys = metric_keys(classes)
    each = {
        f"{name}/{key}": v
        for name, values in lists.items()
        for key, v in zip(keys, values, strict=True)
        if v is not None
    }
    return single | each


def metric_keys(names: Sequence[str]) -> list[str]:
    """The names as parts of keys that MLflow takes, one for each: what it refuses becomes a low line, and one that is empty, long, no part of a path
    or another's already has its place beside it."""
    keys: list[str] = []
    for place, name in enumerate(names):
        key = re.sub(r"[^\w .:-]", "_", name)
        if not key.strip(".") or len(key) > KEY or (key != name and key in {*keys, *names}):
            key = f"{key[:KEY].strip('.') or 'class'} {place}"
        keys.append(key)
    return keys

"""The stage `finetune`: a downstream task from the pretrained encoder, and from scratch, with the same images, epochs
and choice of settings.

All arms try the same learning rates. Each arm's rate is chosen on held-out images; then the test split is read once,
with the chosen rate.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import Augment, TaskSpec, build_ten_crops, check_distinct, constructor_arguments
from firstlight.pipeline.config.stages import DownstreamStage, LabelBudget, TrainingOptions
from firstlight.pipeline.data.splits import Splits, select_evenly_spaced
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_atomically, write_json
from firstlight.pipeline.stages.artifacts import load_decoder, load_encoder
from firstlight.pipeline.stages.checks import (
    check_batch_images,
    check_class_names,
    check_made_network,
    check_scored_images,
    check_target,
    check_test_split,
    count_labelled,
)
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from firstlight.pipeline.stages.stage_kind import MetricsFile, RecipeContext, StageKind
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.multilabel import mean_without_nan
from firstlight.tasks.downstream.task import Scores, Task
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weight_init import initialize_lsuv

NUM_PREDICTED_IMAGES, NUM_LSUV_IMAGES = 4, 64  # test images in a picture; training images that `lsuv` scales by


# The weights that a fine-tuning starts from; the description of `arms` says what each name means.
Arm = Literal["pretrained", "pretrained_decoder", "scratch", "gaussian", "he", "xavier", "lsuv"]


class Finetune(DownstreamStage, TrainingOptions, LabelBudget):
    """Trains a downstream task from the pretrained encoder, and from scratch with the same budget and choice of
    settings.
    """

    kind: Literal["finetune"] = Field(description="The kind of the stage; by default the name of the stage.")
    task: TaskSpec = Field(description="The [task](#tasks).")
    arms: tuple[Arm, ...] = Field(
        ("pretrained", "scratch"),
        min_length=1,
        description="The weights that trainings start from; the last arm is the baseline of the others. `pretrained`: "
        "the encoder. `pretrained_decoder`: the encoder, and the decoder that was pretrained with it. `scratch`: fresh "
        "weights, drawn as `encoder.init` says. `gaussian`, `he`, `xavier`: fresh weights of these distributions. "
        "`lsuv`: fresh weights scaled by the activations of the first training images.",
    )
    test_crops: Literal[1, 10] = Field(
        1, description="The number of crops of a test image whose predictions are averaged. 1: `dataset.eval_augment`."
    )
    test_crop: Literal["corners", "random"] = Field(
        "corners",
        description="The ten crops: `corners` are the four corners, the centre and their mirror images; `random` crops "
        "are drawn by the augmentations of the training.",
    )
    test_scale: float = Field(
        0.875, gt=0.0, le=1.0, description="The side of a `corners` crop as a fraction of the image's shorter side."
    )
    class_groups: dict[str, tuple[str, ...]] = Field(
        {},
        description="Groups of classes by name, for example animals: the task's measure is also reported as the mean "
        "over the classes of each group, as <measure>_<name>.",
    )
    learning_rates: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        (),
        description="The learning rates that every arm is trained with; the best on held-out images is scored. "
        "[]: `optimizer.lr` only.",
    )

    @property
    def takes_encoder(self) -> bool:
        return any(arm.startswith("pretrained") for arm in self.arms)

    @field_validator("learning_rates")
    @classmethod
    def _check_rates(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{rate:g}" for rate in rates}) != len(rates):
            raise ValueError("must differ in their first six digits: the trainings are named by them")
        return rates

    @property
    def companion(self) -> str | None:
        return "decoder" if "pretrained_decoder" in self.arms else None

    @property
    def score_names(self) -> tuple[str, ...]:
        """The task's measure, and that of each group of classes."""
        measure = TASKS[self.task.name].measure
        return (measure, *(f"{measure}_{group}" for group in self.class_groups))

    @property
    def measures(self) -> tuple[Measure, ...]:
        task = self.task.name
        labels = {name: task if name == "accuracy" else f"{task} {name}" for name in self.score_names}
        return tuple(Measure(name, label, self.arms) for name, label in labels.items())

    @model_validator(mode="after")
    def _check_crops(self) -> "Finetune":
        if self.test_crop == "random" and self.test_crops == 1:
            raise ValueError("test_crop: 'random' is not valid with test_crops: 1; valid: corners, or test_crops: 10")
        return self

    @field_validator("class_groups")
    @classmethod
    def _check_class_groups(cls, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, members in groups.items():
            if not re.fullmatch(r"[a-z][a-z0-9]*", name):
                raise ValueError(f"{name!r} is no name of a group; valid: small letters and digits")
            if not members:
                raise ValueError(f"{name} has no classes")
            check_distinct(members, "a class")
        return groups

    @field_validator("arms")
    @classmethod
    def _check_arms(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        if len(set(arms)) != len(arms):
            raise ValueError("must not name an arm twice")
        return arms


def learning_rates_of(stage: Finetune) -> tuple[float, ...]:
    return stage.learning_rates or (stage.optimizer.lr,)


def list_candidates(stage: Finetune) -> dict[str, tuple[str, float]]:
    """Returns the arm and the learning rate of each training, by its name."""
    return {f"{arm}-lr{rate:g}": (arm, rate) for arm in stage.arms for rate in learning_rates_of(stage)}


def finetune_ids(context: StageContext, stage: Finetune, instance: StageInstance) -> np.ndarray:
    return context.splits.labelled_subset(stage, instance.seed, TASKS[stage.task.name].target)


def _build_job(
    context: StageContext, stage: Finetune, instance: StageInstance, folder: Path, rate: float
) -> TrainingJob:
    training = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"lr": rate})})
    plan = context.build_plan(finetune_ids(context, stage, instance), stage.batch_size, instance.seed)
    loader = context.build_loader(context.list_view_augments(stage), instance.seed, TASKS[stage.task.name].target)
    return TrainingJob(
        folder, training, plan, loader, instance.seed, context.options, context.device, withheld=plan.ids[:0]
    )


def _build_task(context: StageContext, stage: Finetune, instance: StageInstance, arm: str) -> Task:
    """Builds the task on the pretrained encoder or on a fresh one. All fresh weights are drawn from the seed, so the
    arms share those of the head.
    """
    size, spec = context.recipe.dataset.image_size, context.recipe.encoder.model_dump()
    torch.manual_seed(instance.seed)
    encoder = Encoder({**spec, "init": arm} if arm in ("gaussian", "he", "xavier") else spec, size)
    if arm == "lsuv":
        initialize_lsuv(encoder, _first_images(context, stage, instance))
    if arm.startswith("pretrained"):
        assert instance.encoder is not None
        encoder.load_state_dict(load_encoder(instance.encoder, size).state_dict())
    torch.manual_seed(instance.seed + 1)  # not where the encoder's weights ended: lsuv has drawn more
    task = TASKS[stage.task.name](encoder, len(context.store.classes), **constructor_arguments(stage.task))
    if arm == "pretrained_decoder":
        assert instance.companion is not None
        task.start_from({"decoder": load_decoder(instance.companion)})
    return task


def check_decoder(decoder: Decoder, stage: Finetune, recipe: Recipe, where: str) -> None:
    """Checks that the task has a place for a pretrained decoder.

    Raises:
        UserError: it has none, or one of another shape.
    """
    encoder = Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size)
    try:
        TASKS[stage.task.name](encoder, 2, **constructor_arguments(stage.task)).start_from({"decoder": decoder})
    except ValueError as error:
        raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None


def _first_images(context: StageContext, stage: Finetune, instance: StageInstance) -> Tensor:
    """(n, 3, S, S) training images with the evaluation augmentation, the same on every worker."""
    return _load_batch(context, stage, finetune_ids(context, stage, instance)[:NUM_LSUV_IMAGES]).views[0].cpu()


def _load_batch(context: StageContext, stage: Finetune, ids: np.ndarray) -> Batch:
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0, TASKS[stage.task.name].target)
    return to_batch(loader.load_once(ids), context.device)


def test_views(context: StageContext, stage: Finetune) -> list[Augment]:
    """Returns the augmentations of the views of a held-out or test image; its answers are averaged over them."""
    if stage.test_crops == 1:
        return [context.recipe.dataset.eval_augment]
    return (
        build_ten_crops(stage.test_scale)
        if stage.test_crop == "corners"
        else context.list_view_augments(stage, stage.test_crops)
    )


@torch.no_grad()
def _score_tasks(context: StageContext, stage: Finetune, tasks: dict[str, Task], ids: np.ndarray) -> dict[str, Scores]:
    """Scores each task on those of `ids` whose target is known. Collective; every image is decoded once."""
    target = TASKS[stage.task.name].target
    ids = context.splits.with_target(ids, target)
    seen: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in tasks}
    for batch in context.iterate_batches(
        ids, max(stage.batch_size, 256) // stage.test_crops, test_views(context, stage), target
    ):
        for name, task in tasks.items():
            seen[name].append(task.eval().observe(batch))
    gathered = {
        name: tuple(gather_rows(column, len(ids)) for column in zip(*rows, strict=True)) for name, rows in seen.items()
    }
    return {
        name: _replace_nan(add_group_scores(stage, tasks[name].score(rows), context.store.classes))
        for name, rows in gathered.items()
    }


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
    """Replaces NaN, the score of a class that does not occur, by None, which JSON has."""
    lists = {
        name: [None if math.isnan(v) else v for v in value] for name, value in scores.items() if isinstance(value, list)
    }
    return {**scores, **lists}


@torch.no_grad()
def _save_predictions(context: StageContext, stage: Finetune, task: Task, file: Path) -> None:
    """Saves the task's pictures of test images, or of held-out images where the recipe leaves the test split alone."""
    ids = context.splits.with_target(
        context.splits.test if context.recipe.score_test else context.splits.val, task.target
    )
    chosen = select_evenly_spaced(ids, NUM_PREDICTED_IMAGES)
    shown = task.eval().draw_predictions(_load_batch(context, stage, chosen)) if len(chosen) else {}
    if shown:
        write_atomically(file, save_tensors({caption: image.cpu().contiguous() for caption, image in shown.items()}))


class FinetuneStage(StageKind[Finetune]):
    """A downstream task from the pretrained encoder, and from scratch."""

    section = Finetune

    def run(self, context: StageContext, stage: Finetune, instance: StageInstance) -> None:
        """Writes `result.json` and pictures into the instance's folder. Called on every worker."""
        tasks: dict[str, Task] = {}
        for name, (arm, rate) in list_candidates(stage).items():
            tasks[name] = _build_task(context, stage, instance, arm)
            fit(_build_job(context, stage, instance, instance.folder / name, rate), tasks[name])
        measure = TASKS[stage.task.name].measure
        held_out = _score_tasks(context, stage, tasks, context.splits.val)
        best = {
            arm: max(
                (n for n, (its, _) in list_candidates(stage).items() if its == arm), key=lambda n: held_out[n][measure]
            )
            for arm in stage.arms
        }
        chosen = {name: tasks[name] for name in best.values()}
        scored = {
            "val": held_out,
            **(
                {"test": _score_tasks(context, stage, chosen, context.splits.test)} if context.recipe.score_test else {}
            ),
        }
        result: dict[str, Any] = {
            "labels": len(finetune_ids(context, stage, instance)),
            "tried": {name: scores[measure] for name, scores in held_out.items()},
        }
        for arm, name in best.items():
            scores = {part: found[name] for part, found in scored.items()}
            result[arm] = {
                **{part: found[measure] for part, found in scores.items()},
                "lr": list_candidates(stage)[name][1],
                "scores": scores,
            }
        if rank() == 0:
            for arm, name in best.items():
                _save_predictions(context, stage, tasks[name], instance.folder / f"{arm}.safetensors")
            write_json(instance.folder / RESULT_FILE, result)
        barrier()

    def metrics_files(self, stage: Finetune, instance: StageInstance) -> list[MetricsFile]:
        names = list_candidates(stage)
        return [
            MetricsFile(instance.folder / name / METRICS_FILE, f"{instance.label} {name}", f"{name}/") for name in names
        ]

    def check_source(self, name: str, stage: Finetune, context: RecipeContext) -> None:
        where = f"stages.{name}"
        check_target(where, TASKS[stage.task.name].target, context, stage.task.name)
        check_test_split(where, context)
        _check_task(name, stage, context)
        _check_groups(where, stage, context.source.classes)

    def check_companion(self, name: str, stage: Finetune, recipe: Recipe, folder: Path) -> None:
        check_decoder(load_decoder(folder), stage, recipe, f"stages.{name}")

    def check_images(self, name: str, stage: Finetune, recipe: Recipe, splits: Splits) -> None:
        target = TASKS[stage.task.name].target
        for seed in recipe.seeds:
            images = count_labelled(f"stages.{name}", stage, splits, seed, target)
            check_batch_images(f"stages.{name}", stage, images)
        check_scored_images(recipe, splits, target)

    def read_score(
        self, stage: Finetune, measure: Measure, arm: str, split: str, instance: StageInstance
    ) -> float | None:
        result = instance.result or {}
        value = result[arm]["scores"].get(split, {}).get(measure.name)
        return None if value is None else float(value)

    def label_measure(self, stage: Finetune, measure: Measure, result: Mapping[str, Any]) -> str:
        what = "labels" if TASKS[stage.task.name].target == "label" else "images"
        return f"{measure.label}, {result['labels']} {what}"

    def describe(self, stage: Finetune, results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        task = TASKS[stage.task.name]
        yield "task", f"{stage.task.name}, scored by {task.measure.replace('_', ' ')}"
        for arm in stage.arms if results else ():
            chosen = ", ".join(f"{result[arm]['lr']:g}" for result in results)
            yield arm, f"learning rate {chosen}, chosen on held-out images" + (", by seed" if len(results) > 1 else "")

    def objectives(self, stage: Finetune) -> tuple[str, ...]:
        """Returns the arms: the task's measure of each. "" is the first arm."""
        return stage.arms

    def check_objective(self, where: str, stage: Finetune, name: str, objective: str) -> None:
        if objective != name:
            super().check_objective(where, stage, name, objective)

    def read_objective(self, stage: Finetune, name: str, instance: StageInstance) -> float:
        result = instance.result
        assert result is not None
        return float(result[name or stage.arms[0]]["val"])

    def streamed_batches(self, stage: Finetune, workers: int) -> list[tuple[int, int]]:
        return [(max(stage.batch_size, 256), 1), (stage.batch_size // workers, 1)]

    def count_epoch_images(self, stage: Finetune, splits: Splits, seed: int) -> tuple[int, int]:
        target = TASKS[stage.task.name].target
        return len(splits.labelled_subset(stage, seed, target)), stage.batch_size


def _check_task(name: str, stage: Finetune, context: RecipeContext) -> None:
    """Checks the task, built once on the encoder, and the decoder that the pretraining before it makes."""
    where, recipe, cls = f"stages.{name}", context.recipe, TASKS[stage.task.name]
    _check_annotated(where, stage, recipe)
    try:
        task = cls(copy.deepcopy(context.encoder), len(context.source.classes), **constructor_arguments(stage.task))
    except ValueError as error:
        raise UserError(f"{where}.task.{error}") from None
    source = recipe.encoder_source(name)
    if "pretrained_decoder" in stage.arms and source is not None and source.stage is not None:
        networks = context.networks[source.stage]
        check_made_network(f"{where}.arms", "decoder", recipe, source.stage, networks)
        try:
            task.start_from(networks)
        except ValueError as error:
            raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None


def _check_annotated(where: str, stage: Finetune, recipe: Recipe) -> None:
    """Checks settings that a task on annotations (classes, masks, boxes) cannot have."""
    target = TASKS[stage.task.name].target
    if target == "label":
        return
    if stage.labels_per_class:
        raise UserError(
            f"{where}.labels_per_class: {stage.labels_per_class} is not valid: images have several classes; "
            "valid: labels_fraction"
        )
    if target in ("mask", "boxes") and stage.test_crops > 1:
        raise UserError(
            f"{where}.test_crops: {stage.test_crops} is not valid: crops of an image have {target} of their own; "
            "valid: 1"
        )
    if recipe.stream.resident == "on":
        raise UserError(
            f"stream.resident: 'on' is not possible for {where}: its images are streamed, with their {target}; "
            "valid: auto, off"
        )


def _check_groups(where: str, stage: Finetune, classes: tuple[str, ...]) -> None:
    cls = TASKS[stage.task.name]
    if stage.class_groups and cls.by_class is None:
        raise UserError(
            f"{where}.class_groups: is not valid: {cls.measure} of {stage.task.name} is no mean over classes; valid: "
            "leave it out"
        )
    for group, members in stage.class_groups.items():
        check_class_names(f"{where}.class_groups.{group}", members, classes)

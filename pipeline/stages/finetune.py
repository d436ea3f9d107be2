"""The stage `finetune`: a downstream task from the pretrained encoder, from the weights that the recipe names, and from
scratch, with the same images, epochs and choice of settings.

All arms try the same learning rates. Each arm's rate is chosen on held-out images; then the test split is read once,
with the chosen rate.
"""

import copy
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from pydantic import Field, TypeAdapter, create_model, field_validator
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.comparison import ComparisonStage
from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.measures import GIVEN_ARM, Measure, is_pretrained_arm
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import Augment, TaskSpec, check_distinct, constructor_arguments
from firstlight.pipeline.config.scoring_views import ScoringViews
from firstlight.pipeline.config.stages import LabelBudget, TrainingOptions
from firstlight.pipeline.data.splits import Splits, select_evenly_spaced
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.records import Count, RecordShape
from firstlight.pipeline.stages.artifacts import WEIGHTS_ORIGIN_KEY, load_decoder, load_encoder, trace_weights
from firstlight.pipeline.stages.checks import (
    check_batch_images,
    check_class_names,
    check_made_network,
    check_scored_images,
    check_target,
    check_test_split,
    count_labelled,
)
from firstlight.pipeline.stages.pictures import FILTERS_FILE, save_filters
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FOLDER, Preprocessing, save_model
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import MetricsFile, RecipeContext, StageKind, StageOutput, StreamedBatch
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.multilabel import mean_without_nan
from firstlight.tasks.downstream.starting_weights import (
    check_rescaling,
    count_response_images,
    fold_encoder,
    rescale_task,
)
from firstlight.tasks.downstream.task import Scores, Task
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weight_init import initialize_lsuv

NUM_PREDICTED_IMAGES, NUM_LSUV_IMAGES = 4, 64  # test images in a picture; training images that `lsuv` scales by


# The weights that a fine-tuning starts from; the description of `arms` says what each name means.
Arm = Literal["pretrained", "pretrained_decoder", "given", "scratch", "gaussian", "he", "xavier", "lsuv"]
# The learning rates that are tried by default, as multiples of the optimiser's.
DEFAULT_RATE_FACTORS = (1 / 3, 1.0, 3.0)
# The arms that are a way to draw all weights, those of the task's layers too.
DRAWN_ARMS = ("gaussian", "he", "xavier")


class Finetune(ComparisonStage, TrainingOptions, LabelBudget, ScoringViews):
    """Trains a downstream task from the pretrained encoder, and from scratch with the same budget and choice of
    settings.
    """

    kind: Literal["finetune"] = Field(description="The kind of the stage; by default the name of the stage.")
    task: TaskSpec = Field(description="The [task](#tasks).")
    arms: tuple[Arm, ...] | None = Field(
        None,
        min_length=1,
        description="The weights that trainings start from; the last arm is the baseline of the others, and `given` of "
        "the pretrained ones. `pretrained`: the encoder. `pretrained_decoder`: the encoder, and the decoder that was "
        "pretrained with it. `given`: the weights that `encoder.weights` names, as they came. `scratch`: fresh "
        "weights, drawn as `encoder.init` says. `gaussian`, `he`, `xavier`: fresh weights of these distributions, in "
        "the task's layers too. `lsuv`: an encoder of fresh weights scaled by the activations of the first training "
        "images. The task's layers are otherwise drawn as `task.init` says. null: `pretrained`, `given` and `scratch`, "
        "as far as the recipe has them.",
    )
    batch_norm: Literal["keep", "fold"] = Field(
        "keep",
        description="The batch normalisations of the encoder. `fold`: they are computed into the convolutions before "
        "them, as they are in evaluation mode, so that the network has none (NAT, section 4.2); in every arm.",
    )
    rescale: Literal["none", "new_layers", "all_layers"] = Field(
        "none",
        description="Rescaling of the first weights of every arm by the responses to the first training images "
        "(Krähenbühl et al. 2016), for networks without normalisations. `all_layers`: every channel of every layer is "
        "given a unit variance (their algorithm 1), then the layers are balanced so that all change at the same rate "
        "(algorithm 2). `new_layers`: a pretrained encoder is only balanced, as in their code. The layer that gives "
        "the predictions stays as it was drawn.",
    )
    class_groups: dict[str, tuple[str, ...]] = Field(
        {},
        description="Groups of classes by name, for example animals: the task's measure is also reported as the mean "
        "over the classes of each group, as <measure>_<name>.",
    )
    learning_rates: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(
        None,
        description="The learning rates that every arm is trained with; the best on held-out images is scored. null: "
        "`optimizer.lr`, a third of it and three times it. []: `optimizer.lr` only.",
    )

    register_as: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z",
        description="The name under which the fine-tuned model of the first arm is registered in MLflow's model "
        "registry, with the alias `current`: `firstlight predict models:/<name>@current` takes it, and as `encoder` a "
        "stage of another recipe starts from its encoder. null: it has no name.",
    )

    makes_model: ClassVar[bool] = True
    arm_names: ClassVar[tuple[str, ...]] = get_args(Arm)
    fresh_arm: ClassVar[str] = "scratch"

    @field_validator("learning_rates")
    @classmethod
    def _check_rates(cls, rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if rates is not None and len({f"{rate:g}" for rate in rates}) != len(rates):
            raise ValueError("must differ in their first six digits: the trainings are named by them")
        return rates

    @property
    def companions(self) -> tuple[str, ...]:
        return ("decoder",) if "pretrained_decoder" in self.compared_arms else ()

    @property
    def score_names(self) -> tuple[str, ...]:
        """The task's measure, and that of each group of classes."""
        measure = TASKS[self.task.name].measure
        return (measure, *(f"{measure}_{group}" for group in self.class_groups))

    @property
    def measures(self) -> tuple[Measure, ...]:
        task = self.task.name
        labels = {name: task if name == "accuracy" else f"{task} {name}" for name in self.score_names}
        return tuple(Measure(name, label, self.compared_arms) for name, label in labels.items())

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


def learning_rates_of(stage: Finetune) -> tuple[float, ...]:
    """Returns the learning rates that every arm is trained with.

    The default grid is the same for all arms: with one rate, the arm that it suits better would seem to be better.
    """
    if stage.learning_rates is None:
        return tuple(float(f"{factor * stage.learning_rate:.3g}") for factor in DEFAULT_RATE_FACTORS)
    return stage.learning_rates or (stage.learning_rate,)


def list_candidates(stage: Finetune) -> dict[str, tuple[str, float]]:
    """Returns the arm and the learning rate of each training, by its name."""
    return {f"{arm}-lr{rate:g}": (arm, rate) for arm in stage.compared_arms for rate in learning_rates_of(stage)}


def finetune_ids(context: StageContext, stage: Finetune, instance: StageInstance) -> np.ndarray:
    return context.splits.labelled_subset(stage, instance.seed, TASKS[stage.task.name].target)


def _build_job(
    context: StageContext, stage: Finetune, instance: StageInstance, folder: Path, rate: float
) -> TrainingJob:
    training = stage.model_copy(update={"optimizer": stage.optimizer.with_rate(rate)})
    plan = context.build_plan(finetune_ids(context, stage, instance), stage.batch_size, instance.seed)
    loader = context.build_loader(context.list_view_augments(stage), instance.seed, TASKS[stage.task.name].target)
    return TrainingJob(
        folder, training, plan, loader, instance.seed, context.options, context.device, withheld=plan.ids[:0]
    )


def _build_task(context: StageContext, stage: Finetune, instance: StageInstance, arm: str) -> Task:
    """Builds the task on the encoder of an arm, a loaded or a fresh one.

    All fresh weights are drawn from the seed, so the arms share those of the head, unless an arm is a way to draw them.
    """
    size, spec = context.recipe.dataset.image_size, context.recipe.network_spec
    torch.manual_seed(instance.seed)
    encoder = Encoder({**spec, "init": arm} if arm in DRAWN_ARMS else spec, size)
    if arm == "lsuv":
        initialize_lsuv(encoder, _first_images(context, stage, instance))
    is_loaded = is_pretrained_arm(arm) or arm == GIVEN_ARM
    if is_loaded:
        folder = instance.given if arm == GIVEN_ARM else instance.encoder
        assert folder is not None
        encoder.load_state_dict(load_encoder(folder, size).state_dict())
    if stage.batch_norm == "fold":
        fold_encoder(encoder)
    torch.manual_seed(instance.seed + 1)  # not where the encoder's weights ended: lsuv has drawn more
    drawn = {"init": arm} if arm in DRAWN_ARMS else {}
    task = TASKS[stage.task.name](encoder, len(context.store.classes), **constructor_arguments(stage.task) | drawn)
    if arm == "pretrained_decoder":
        task.start_from({"decoder": load_decoder(instance.companions["decoder"])})
    if stage.rescale != "none":
        ids = finetune_ids(context, stage, instance)[: count_response_images(size)]
        kept = stage.rescale == "new_layers" and is_loaded
        rescale_task(task, _load_batch(context, stage, ids, torch.device("cpu")), new_layers_only=kept)
    return task


def check_decoder(decoder: Decoder, stage: Finetune, recipe: Recipe, where: str) -> None:
    """Checks that the task has a place for a pretrained decoder.

    Raises:
        UserError: it has none, or one of another shape.
    """
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    try:
        TASKS[stage.task.name](encoder, 2, **constructor_arguments(stage.task)).start_from({"decoder": decoder})
    except ValueError as error:
        raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None


def _first_images(context: StageContext, stage: Finetune, instance: StageInstance) -> Tensor:
    """(n, 3, S, S) training images with the evaluation augmentation, the same on every worker."""
    return _load_batch(context, stage, finetune_ids(context, stage, instance)[:NUM_LSUV_IMAGES]).views[0].cpu()


def _load_batch(context: StageContext, stage: Finetune, ids: np.ndarray, device: torch.device | None = None) -> Batch:
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0, TASKS[stage.task.name].target)
    return to_batch(loader.load_once(ids), device or context.device)


def test_views(context: StageContext, stage: Finetune) -> list[Augment]:
    """Returns the augmentations of the views of a held-out or test image; its answers are averaged over them."""
    if stage.scored_pixels == "image":
        return stage.build_covering_windows(context.read_mask_sizes())
    if stage.test_crops == 1:
        return [context.recipe.dataset.eval_augment]
    return (
        stage.build_corner_crops()
        if stage.test_crop == "corners"
        else context.list_view_augments(stage, stage.test_crops)
    )


@torch.no_grad()
def _score_tasks(context: StageContext, stage: Finetune, tasks: dict[str, Task], ids: np.ndarray) -> dict[str, Scores]:
    """Scores each task on those of `ids` whose target is known. Collective; every image is decoded once."""
    target = TASKS[stage.task.name].target
    ids = context.splits.with_target(ids, target)
    seen: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in tasks}
    views = test_views(context, stage)
    size, whole = max(max(stage.batch_size, 256) // len(views), 1), stage.scored_pixels == "image"
    for batch in context.iterate_batches(ids, size, views, target, whole):
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
    """Replaces NaN, the score of a class that does not occur or of images that give none, by None, which JSON has."""
    found: dict[str, Any] = {}
    for name, value in scores.items():
        values = [None if math.isnan(v) else v for v in (value if isinstance(value, list) else [value])]
        found[name] = values if isinstance(value, list) else values[0]
    return found


def _read_number(value: float | None) -> float:
    """Returns a score of a result; NaN where the images gave none."""
    return math.nan if value is None else float(value)


def _rank_score(value: Any) -> float:
    """Returns a score for comparisons; none is the lowest, so that the first rate is chosen where there is no score."""
    return -math.inf if value is None else float(value)


def count_scored_classes(stage: Finetune, result: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns how many classes the measure is a mean over, and of how many; None if it is no mean over classes."""
    of = TASKS[stage.task.name].by_class
    scores = result[stage.compared_arms[0]]["scores"]
    values = scores.get("test", scores["val"]).get(of) if of is not None else None
    return None if values is None else (sum(value is not None for value in values), len(values))


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


def _save_models(
    context: StageContext, stage: Finetune, instance: StageInstance, tasks: Mapping[str, Task], result: dict[str, Any]
) -> None:
    """Saves the model of the first arm, and what figures need of the fine-tuned networks, which are given by arm."""
    if stage.task.train == "all":
        filters = {arm: task.encoder.compose_first_filters() for arm, task in tasks.items()}
        save_filters(filters, instance.folder / FILTERS_FILE)
    arm = stage.compared_arms[0]
    save_model(
        tasks[arm],
        stage.task,
        instance.folder / MODEL_FOLDER,
        classes=context.store.classes,
        preprocessing=describe_preprocessing(context, stage),
        batch_norm=stage.batch_norm,
        facts={
            "arm": arm,
            "lr": result[arm]["lr"],
            "labels": result["labels"],
            "store": context.store.hash,
            "seed": instance.seed,
            **_trace_arm(context, instance, arm),
        },
    )


def _trace_arm(context: StageContext, instance: StageInstance, arm: str) -> dict[str, Any]:
    """Returns what is known of the existing weights that an arm comes from, as a fact of its model; {} if of none."""
    folder = instance.given if arm == GIVEN_ARM else instance.encoder if is_pretrained_arm(arm) else None
    origin = trace_weights(context.recipe, instance.stage, folder, arm) if folder else {}
    return {WEIGHTS_ORIGIN_KEY: origin} if origin else {}


def describe_preprocessing(context: StageContext, stage: Finetune) -> Preprocessing:
    """Returns how the fine-tuned model sees an image: in the views that test images are scored by."""
    data, is_whole = context.recipe.dataset, stage.scored_pixels == "image"
    views = [data.eval_augment] if is_whole else test_views(context, stage)
    return Preprocessing(
        data.image_size,
        tuple(tuple(op.model_dump(mode="json") for op in ops) for ops in views),
        {"scale": stage.test_scale, "size": stage.test_size} if is_whole else None,
        data.max_pixels,
        context.store.levels,
    )


class _ArmResultShape(RecordShape):
    """The scores of an arm, by split, with the learning rate that was chosen on held-out images."""

    lr: float
    val: float | None
    scores: dict[str, dict[str, float | list[float | None] | None]]


class FinetuneStage(StageKind[Finetune]):
    """A downstream task from the pretrained encoder, and from scratch."""

    section = Finetune

    def outputs(self, stage: Finetune, instance: StageInstance) -> list[StageOutput]:
        folder = instance.folder / MODEL_FOLDER
        return [StageOutput("fine-tuned model", folder, f"firstlight predict {shlex.quote(str(folder))} <images>")]

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
                (n for n, (its, _) in list_candidates(stage).items() if its == arm),
                key=lambda n: _rank_score(held_out[n][measure]),
            )
            for arm in stage.compared_arms
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
            _save_models(context, stage, instance, {arm: tasks[name] for arm, name in best.items()}, result)
            instance.write_result(result)
        barrier()

    def metrics_files(self, stage: Finetune, instance: StageInstance) -> list[MetricsFile]:
        names = list_candidates(stage)
        return [
            MetricsFile(instance.folder / name / METRICS_FILE, f"{instance.label} {name}", f"{name}/") for name in names
        ]

    def result_shape(self, stage: Finetune) -> TypeAdapter[Any]:
        arms: dict[str, Any] = dict.fromkeys(stage.compared_arms, (_ArmResultShape, ...))
        keys: dict[str, Any] = {"labels": (Count, ...), "tried": (dict[str, float | None], ...)}
        return TypeAdapter(create_model("FinetuneResult", __base__=RecordShape, **keys, **arms))

    def check_source(self, name: str, stage: Finetune, context: RecipeContext) -> None:
        where = f"stages.{name}"
        check_target(where, TASKS[stage.task.name].target, context, stage.task.name)
        check_test_split(where, context)
        _check_task(name, stage, context)
        _check_groups(where, stage, context.source.classes)

    def check_companions(self, name: str, stage: Finetune, recipe: Recipe, companions: Mapping[str, Path]) -> None:
        if "decoder" in companions:
            check_decoder(load_decoder(companions["decoder"]), stage, recipe, f"stages.{name}")

    def check_images(self, name: str, stage: Finetune, recipe: Recipe, splits: Splits) -> None:
        target = TASKS[stage.task.name].target
        for seed in recipe.seeds:
            images = count_labelled(f"stages.{name}", stage, splits, seed, target)
            check_batch_images(f"stages.{name}", stage, images)
        check_scored_images(recipe, splits, target)

    def read_score(
        self, stage: Finetune, measure: Measure, arm: str, split: str, instance: StageInstance
    ) -> float | None:
        found = (instance.result or {})[arm]["scores"].get(split, {})
        return _read_number(found[measure.name]) if measure.name in found else None

    def label_measure(self, stage: Finetune, measure: Measure, result: Mapping[str, Any]) -> str:
        what = "labels" if TASKS[stage.task.name].target == "label" else "images"
        scored = count_scored_classes(stage, result)
        some = f", {scored[0]} of {scored[1]} classes" if scored is not None and scored[0] < scored[1] else ""
        return f"{measure.label}, {result['labels']} {what}{some}"

    def describe(self, stage: Finetune, results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        task = TASKS[stage.task.name]
        yield "task", f"{stage.task.name}, scored by {task.measure.replace('_', ' ')}"
        scored = count_scored_classes(stage, results[0]) if results else None
        if scored is not None and scored[0] < scored[1]:
            yield (
                "classes",
                f"{scored[0]} of {scored[1]} are scored; one that no test image shows, or that all show, is not",
            )
        for arm in stage.compared_arms if results else ():
            chosen = ", ".join(f"{result[arm]['lr']:g}" for result in results)
            yield arm, f"learning rate {chosen}, chosen on held-out images" + (", by seed" if len(results) > 1 else "")

    def objectives(self, stage: Finetune) -> tuple[str, ...]:
        """Returns the arms: the task's measure of each. "" is the first arm."""
        return stage.compared_arms

    def is_share_objective(self, stage: Finetune, name: str) -> bool:
        return True

    def check_objective(self, where: str, stage: Finetune, name: str, objective: str) -> None:
        if objective != name:
            super().check_objective(where, stage, name, objective)

    def read_objective(self, stage: Finetune, name: str, instance: StageInstance) -> float:
        result = instance.result
        assert result is not None
        return _read_number(result[name or stage.compared_arms[0]]["val"])

    def streamed_batches(self, stage: Finetune, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        return [(images, [dataset.image_size]) for images in (max(stage.batch_size, 256), stage.batch_size // workers)]

    def count_epoch_images(self, stage: Finetune, splits: Splits, seed: int) -> tuple[int, int]:
        target = TASKS[stage.task.name].target
        return len(splits.labelled_subset(stage, seed, target)), stage.batch_size


def _check_task(name: str, stage: Finetune, context: RecipeContext) -> None:
    """Checks the task, built once on the encoder, and the decoder that the pretraining before it makes."""
    where, recipe, cls = f"stages.{name}", context.recipe, TASKS[stage.task.name]
    _check_annotated(where, stage, recipe)
    encoder = copy.deepcopy(context.encoder)
    if stage.batch_norm == "fold":
        try:
            fold_encoder(encoder)
        except ValueError as error:
            raise UserError(f"{where}.batch_norm: 'fold' is not valid: {error}; valid: keep") from None
    try:
        task = cls(encoder, len(context.source.classes), **constructor_arguments(stage.task))
    except ValueError as error:
        raise UserError(f"{where}.task.{error}") from None
    if stage.rescale != "none":
        try:
            check_rescaling(task)
        except ValueError as error:
            raise UserError(f"{where}.rescale: '{stage.rescale}' is not valid: {error}; valid: none") from None
    source = recipe.encoder_source(name)
    if "pretrained_decoder" in stage.compared_arms and source is not None and source.stage is not None:
        networks = context.networks[source.stage]
        check_made_network(f"{where}.arms", "decoder", recipe, source.stage, networks)
        try:
            task.start_from(networks)
        except ValueError as error:
            raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None


def _check_annotated(where: str, stage: Finetune, recipe: Recipe) -> None:
    """Checks settings that a task on annotations (classes, masks, boxes) cannot have."""
    target = TASKS[stage.task.name].target
    if target != "mask" and stage.scored_pixels == "image":
        names = ", ".join(name for name, cls in TASKS.items() if cls.target == "mask")
        raise UserError(
            f"{where}.scored_pixels: 'image' is not valid: {stage.task.name} has no masks; valid: view, or "
            f"task.name: {names}"
        )
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

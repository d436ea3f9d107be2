"""The stage `pretrain`: an encoder from images without labels, or with some. Labels that the stage does not ask for are
withheld from the method.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter, model_validator
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.messages import SECTION_KEY
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import MethodSpec, constructor_arguments
from firstlight.pipeline.config.stages import (
    GIVEN,
    PREVIOUS,
    RANDOM,
    FeatureMonitorOptions,
    LabelBudget,
    StageConfig,
    TrainingOptions,
)
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.plan import SemiSupervisedPlan, TrainingPlan
from firstlight.pipeline.data.splits import MEASURED_SPLITS, Splits, select_evenly_spaced
from firstlight.pipeline.errors import StopTraining, UserError, suggest_valid
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.records import Count, RecordShape, Share
from firstlight.pipeline.stages.artifacts import (
    TRAINED_ON_ALL_KEY,
    SavedTable,
    load_encoder,
    save_encoder,
    save_network,
    save_table,
)
from firstlight.pipeline.stages.checks import check_batch_images, check_made_network, check_test_split, count_labelled
from firstlight.pipeline.stages.features.nearest import find_nearest
from firstlight.pipeline.stages.features.projection import project_principal
from firstlight.pipeline.stages.pictures import (
    FILTERS_FILE,
    NUM_VIEWED_IMAGES,
    PICTURES_FILE,
    PRETRAINED_FILTERS,
    SHOWN_IMAGES,
    pair_with_untrained,
    save_filters,
    save_pictures,
)
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind, StageOutput
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, STEPS_PER_EPOCH_KEY, read_metrics
from firstlight.pipeline.train.monitor import FeatureMonitor as Monitor
from firstlight.pipeline.train.selection import SelectionOptions
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.collective import barrier, rank, world_size
from firstlight.tasks.feature_metrics import FEATURE_METRICS
from firstlight.tasks.nn.encoders import Encoder, pool_maps
from firstlight.tasks.pretrain import (
    METHODS,
    batch_requirements,
    build_method,
    check_method_length,
    list_method_warnings,
)
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo
from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.visuals import ImageGrid

# The feature metrics that a training logs on the way, where `watch.every` asks for it.
MONITOR_OBJECTIVES = (*(f"watch_{name}" for name in FEATURE_METRICS), "watch_knn", "watch_alignment")
# What every training logs, and no trial can be judged by.
COUNTERS = {"step", "of", "epoch", STEPS_PER_EPOCH_KEY, "time", "images_per_s", "data_wait", "lr"}
# Rows of the tables that are built to be measured or checked.
TABLE_ROWS = 1024
PRETRAIN_MAP_FILE = "map.safetensors"
# The most held-out images that are compared with each other.
MAX_COMPARED_IMAGES = 1000
# Separates the draw of unlabelled images from all others of the seed.
UNLABELLED_STREAM = 0x756E6C62


class Pretrain(StageConfig, TrainingOptions, LabelBudget):
    """Learns an encoder from images without labels, or with some."""

    kind: Literal["pretrain"] = Field(description="The kind of the stage; by default the name of the stage.")
    method: MethodSpec = Field(description="The [method](#methods).")
    encoder: str | None = Field(
        None,
        pattern=rf"^({PREVIOUS}|{GIVEN}|{RANDOM}|runs:/[^/]+/.+|models:/.+)\z",
        description="The encoder that the training continues; the method's head and tables start fresh. `given`: the "
        "weights that `encoder.weights` names. `previous`: that of the pretraining stage before this one. "
        "`runs:/<run>/encoder`, `models:/<name>@<alias>`, `models:/<name>/<version>`: one in MLflow. `random`: fresh "
        "weights. null: `given` where the recipe names weights, otherwise `random`.",
    )
    watch: FeatureMonitorOptions = Field(
        FeatureMonitorOptions(), description="[Feature metrics](#feature-metrics-watch) during the training."
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="The weights that are handed on: the last ones, or the best by `watch.measure` on held-out images "
        "among all that were measured. The weights that the training started from are one of them.",
    )
    early_stopping: int | None = Field(
        None,
        ge=1,
        description="The number of measurements of `watch.measure` in a row without a better one after which the "
        "training ends. null: it runs to its end.",
    )
    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="The factor of the learning rate from a feature map's layers to those of the map before it. The "
        "method's own layers, and those of the deepest map, have the rate itself.",
    )
    first_view: Literal["augmented", "plain"] = Field(
        "augmented",
        description="The augmentations of the first view, for methods of several views. `plain`: "
        "`dataset.eval_augment`.",
    )
    labelled_per_batch: int = Field(
        0,
        ge=0,
        description="The number of labelled images in every batch of `batch_size` images. An epoch is a pass over the "
        "others, if there are any. 0: the method sees no label.",
    )
    max_unlabelled: int | None = Field(
        None,
        ge=1,
        description="The number of images beside the labelled ones, where a batch has both; drawn by the seed. A "
        "larger number adds to the images of a smaller one, and the labelled ones stay the same. null: all others.",
    )
    pictures: Literal["val", "test"] = Field(
        "val",
        description="The images that the method's figures show: held-out or test images. They change nothing of the "
        "training.",
    )
    register_as: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z",
        description="The name under which the encoder is registered in MLflow's model registry, with the alias "
        "`current`. null: it is not registered.",
    )

    makes_encoder: ClassVar[bool] = True
    values_without_test: ClassVar[Mapping[str, str]] = {"pictures": "val"}

    @property
    def start(self) -> str | None:
        return self.encoder

    def complete_arms(self, has_pretrained: bool, has_given: bool) -> "Pretrain":
        """Returns the stage with its start: the given weights, or fresh ones."""
        return self if self.encoder else self.model_copy(update={"encoder": GIVEN if has_given else RANDOM})

    @property
    def keys_without_effect(self) -> frozenset[str]:
        return super().keys_without_effect | {"register_as"} | (set() if self.selection else {"watch"})

    @property
    def selection(self) -> SelectionOptions | None:
        """The measure that the weights are judged by during the training; None if they are not."""
        if self.keep == "last" and self.early_stopping is None:
            return None
        return SelectionOptions(f"watch_{self.watch.measure}", self.keep == "best", self.early_stopping)

    @model_validator(mode="after")
    def _check_selection(self) -> "Pretrain":
        if self.selection is not None and not self.watch.every:
            key = "keep: best" if self.keep == "best" else f"early_stopping: {self.early_stopping}"
            raise ValueError(
                f"{key} needs {SECTION_KEY}.watch.every: it is 0, so nothing is measured; valid: 1 or more"
            )
        return self

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The accuracy of the method's own classifier, what the method measures of held-out images, and the last values
        of what it logs.
        """
        method = METHODS[self.method.name]
        found = [Measure("accuracy", "its own classifier", only_if_expected=True)] if self.labelled_per_batch else []
        for name in method.image_metrics:
            decibels = name == "psnr"
            label = f"{'PSNR (dB)' if decibels else name}, held-out images"
            found.append(Measure(name, label, scale=1.0 if decibels else 100.0, only_if_expected=True))
        return (*found, *(Measure(name, name, only_if_expected=True) for name in method.reported_metrics))

    @property
    def measured_splits(self) -> frozenset[str]:
        """Both where the method learns a classifier; `val` for what is watched, or measured of each image."""
        if self.labelled_per_batch:
            return MEASURED_SPLITS
        held_out = self.watch.every > 0 or bool(METHODS[self.method.name].image_metrics)
        return frozenset(["val"] * held_out + ["test"] * (self.pictures == "test"))


def batch_requirements_of(stage: Pretrain) -> BatchRequirements:
    return batch_requirements(stage.method.name, constructor_arguments(stage.method))


def build_job(context: StageContext, stage: Pretrain, instance: StageInstance) -> TrainingJob:
    """Returns the training of one seed."""
    train, labelled = context.splits.train, pretrain_label_ids(context, stage, instance.seed)
    withheld = np.setdiff1d(train, labelled, assume_unique=True)
    plan = _build_plan(context, stage, labelled, instance.seed)
    loader = build_view_loader(context, stage, instance.seed)
    place = instance.folder, stage, plan, loader, instance.seed, context.options, context.device
    return TrainingJob(*place, withheld, instance.begin, instance.until, stage.selection)


def pretrain_label_ids(context: StageContext, stage: Pretrain, seed: int) -> np.ndarray:
    """Returns the ids whose labels the method may see."""
    return context.splits.labelled_subset(stage, seed) if stage.labelled_per_batch else context.splits.train[:0]


def draw_unlabelled_ids(splits: Splits, stage: Pretrain, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Returns the sorted training ids that are seen beside the labelled ones."""
    rest = np.setdiff1d(splits.train, labelled, assume_unique=True)
    if stage.max_unlabelled is None:
        return rest
    return np.sort(np.random.default_rng((seed, UNLABELLED_STREAM)).permutation(rest)[: stage.max_unlabelled])


def _build_plan(context: StageContext, stage: Pretrain, labelled: np.ndarray, seed: int) -> TrainingPlan:
    if stage.labelled_per_batch == 0:
        return context.build_plan(context.splits.train, stage.batch_size, seed)
    if stage.labelled_per_batch == stage.batch_size:
        return context.build_plan(labelled, stage.batch_size, seed)
    rest = draw_unlabelled_ids(context.splits, stage, labelled, seed)
    return SemiSupervisedPlan(
        context.build_plan(labelled, stage.labelled_per_batch, seed),
        context.build_plan(rest, stage.batch_size - stage.labelled_per_batch, seed),
    )


def build_view_loader(context: StageContext, stage: Pretrain, seed: int) -> Loader:
    views = context.list_view_augments(stage, batch_requirements_of(stage).views)
    if stage.first_view == "plain":
        views[0] = context.recipe.dataset.eval_augment
    return context.build_loader(views, seed)


def build_seeded_method(context: StageContext, stage: Pretrain, job: TrainingJob, start: Path | None = None) -> Method:
    """Builds the method on the encoder in the folder `start`, or on a fresh one. Fresh weights are drawn from the seed,
    those of the method's own layers too.
    """
    torch.manual_seed(job.seed)
    encoder = Encoder(context.recipe.network_spec, context.recipe.dataset.image_size)
    if start is not None:
        encoder.load_state_dict(load_encoder(start, encoder.image_size).state_dict())
    labels = torch.from_numpy(context.splits.labels[job.plan.ids])
    info = TrainingInfo(len(job.plan.ids), job.num_epochs, job.seed, len(context.store.classes), labels)
    method = build_method(stage.method.name, encoder, info, constructor_arguments(stage.method))
    method.layer_decay = stage.layer_decay
    return method


@torch.no_grad()
def _score_classifier(context: StageContext, stage: Pretrain, method: Method) -> dict[str, float]:
    """Returns the accuracy of the classifier that the method learned from labels, on held-out and test images; {} if it
    has none. Collective.
    """
    found: dict[str, float] = {}
    if not batch_requirements_of(stage).labels:
        return found
    for part, ids in (
        ("val", context.splits.val),
        ("test", context.splits.test if context.recipe.score_test else context.splits.test[:0]),
    ):
        ids = context.splits.with_target(ids, "label")
        if len(ids) >= world_size():
            batches = context.iterate_batches(ids, max(stage.batch_size, 256))
            right = [(method.predict(batch.views[0]) == batch.labels).double() for batch in batches]  # type: ignore[union-attr]
            found[part] = float(gather_rows(right, len(ids)).mean())
    return found


@torch.no_grad()
def _draw_pictures(
    context: StageContext, stage: Pretrain, method: Method, instance: StageInstance, device: torch.device
) -> tuple[ImageGrid, ...]:
    """Returns what the method, on `device`, draws of held-out or test images; nothing on ranks other than 0."""
    # Test images may be sorted by class.
    test = select_evenly_spaced(context.splits.test, NUM_VIEWED_IMAGES)
    ids = test if stage.pictures == "test" else context.splits.shown[:NUM_VIEWED_IMAGES]
    shown = (
        "training images" if stage.pictures == "val" and not len(context.splits.val) else SHOWN_IMAGES[stage.pictures]
    )
    if rank() != 0 or len(ids) == 0:
        return ()
    batch = to_batch(context.build_loader([context.recipe.dataset.eval_augment], instance.seed).load_once(ids), device)
    return method.eval().image_grids(batch, shown)


@torch.no_grad()
def _compute_held_out_features(
    context: StageContext, stage: Pretrain, method: Method
) -> tuple[np.ndarray, Tensor] | None:
    """Returns the ids of held-out images, or training images where none is held out, and their (n, C) features.

    Returns None if there are too few to compare, or a feature is not finite. Collective.
    """
    ids = select_evenly_spaced(context.splits.shown, MAX_COMPARED_IMAGES)
    if len(ids) < max(world_size(), 3):
        return None
    method.eval()
    parts = [
        pool_maps(method.encoder(batch.views[0]), "avg").float()
        for batch in context.iterate_batches(ids, max(stage.batch_size, 256))
    ]
    features = gather_rows(parts, len(ids))
    return (ids, features) if bool(torch.isfinite(features).all()) else None


def _save_pretrain_map(instance: StageInstance, ids: np.ndarray, features: Tensor) -> None:
    points, share = project_principal(features.cpu().numpy())
    found = {"ids": ids, "points": points, "share": share}
    write_atomically(
        instance.folder / PRETRAIN_MAP_FILE,
        save_tensors({name: torch.from_numpy(array.copy()) for name, array in found.items()}),
    )


@torch.no_grad()
def _measure_held_out(context: StageContext, stage: Pretrain, method: Method) -> dict[str, float]:
    """Returns the means over held-out images of what the method measures of each; {} if it measures nothing.
    Collective.
    """
    ids = context.splits.val
    if not method.image_metrics or len(ids) < world_size():
        return {}
    size = stage.batch_size // (world_size() * stage.accumulate)  # what fits into memory in the training
    seen = [method.measure_images(batch) for batch in context.iterate_batches(ids, size)]
    return {
        name: float(gather_rows([found[name].double() for found in seen], len(ids)).mean())
        for name in method.image_metrics
    }


class _PretrainShape(RecordShape):
    """The result of a pretraining. The names in `handed_on` are those of folders."""

    images: Count
    handed_on: list[Annotated[str, Field(pattern=r"^[a-z][a-z_]*\z")]]
    accuracy: dict[str, Share]
    held_out: dict[str, float]
    neighbours: list[Any] = Field([])


PRETRAIN_SHAPE = TypeAdapter(_PretrainShape)


class PretrainStage(StageKind[Pretrain]):
    """An encoder from images without labels, or with some."""

    section = Pretrain

    def outputs(self, stage: Pretrain, instance: StageInstance) -> list[StageOutput]:
        folder = instance.folder / "encoder"
        return [StageOutput("encoder", folder, f'fl.load_encoder("{folder}")')]

    def run(self, context: StageContext, stage: Pretrain, instance: StageInstance) -> None:
        """Trains, and writes `encoder/`, the method's other networks and tables, pictures and `result.json` into the
        instance's folder.

        Called on every worker.
        """
        training = build_job(context, stage, instance)
        method = build_seeded_method(context, stage, training, instance.encoder)
        # The method is on the CPU until `fit` places it.
        untrained = _draw_pictures(context, stage, method, instance, torch.device("cpu"))
        fit(training, method, Monitor(context, stage, stage.watch, training, method))
        accuracy, image_metrics = _score_classifier(context, stage, method), _measure_held_out(context, stage, method)
        held_out = _compute_held_out_features(context, stage, method)
        values = {name: table.gather_values() for name, table in method.exported_tables().items()}
        if rank() == 0:
            facts = {"method": stage.method.model_dump(mode="json"), "store": context.store.hash, "seed": instance.seed}
            # Later recipes draw test and held-out images of the same store, which were trained on here
            facts |= {TRAINED_ON_ALL_KEY: True} if not len(context.splits.val) and not len(context.splits.test) else {}
            save_encoder(method.encoder, instance.folder / "encoder", facts)
            for name, network in method.exported_networks().items():
                save_network(network, instance.folder / name, facts)
            for name, rows in values.items():
                save_table(SavedTable(training.plan.ids, rows, context.store.hash), instance.folder / name, facts)
            save_pictures(
                pair_with_untrained(untrained, _draw_pictures(context, stage, method, instance, context.device)),
                instance.folder / PICTURES_FILE,
            )
            save_filters({PRETRAINED_FILTERS: method.encoder.compose_first_filters()}, instance.folder / FILTERS_FILE)
            result = {
                "images": len(training.plan.ids),
                "handed_on": sorted([*method.exported_networks(), *values]),
                "accuracy": accuracy,
                "held_out": image_metrics,
            }
            if held_out is not None:
                result["neighbours"] = find_nearest(*held_out, context.splits.labels)
                _save_pretrain_map(instance, *held_out)
            instance.write_result(result)
        barrier()

    def result_shape(self, stage: Pretrain) -> TypeAdapter[Any]:
        return PRETRAIN_SHAPE

    def check_source(self, name: str, stage: Pretrain, context: RecipeContext) -> None:
        if stage.pictures == "test":
            check_test_split(f"stages.{name}.pictures", context)
        classes = 0 if context.source.annotations else len(context.source.classes)
        method = _check_method(f"stages.{name}", stage, context.recipe, context.encoder, classes)
        networks = context.networks[name] = method.exported_networks()
        context.tables[name] = frozenset(method.exported_tables())
        if stage.watch.every and stage.watch.features == "head":
            check_made_network(f"stages.{name}.watch.features", "head", context.recipe, name, networks)

    def check_images(self, name: str, stage: Pretrain, recipe: Recipe, splits: Splits) -> None:
        for seed in recipe.seeds:
            check_batch_images(f"stages.{name}", stage, _count_images(f"stages.{name}", stage, splits, seed))
            _check_steps(f"stages.{name}", stage, splits, seed)
        if stage.watch.every and len(splits.val) < max(recipe.scale.max_workers, 2):
            raise UserError(
                f"dataset.val_fraction: leaves {len(splits.val)} held-out images, too few for "
                f"stages.{name}.watch.every: "
                f"{stage.watch.every}"
            )
        if stage.selection and stage.watch.measure == "knn" and not (splits.labels[splits.val] >= 0).any():
            raise UserError(
                f"stages.{name}.watch.measure: 'knn' is not valid: no held-out image has a label; valid: rankme"
            )

    def read_score(
        self, stage: Pretrain, measure: Measure, arm: str, split: str, instance: StageInstance
    ) -> float | None:
        result, name = instance.result or {}, measure.name
        if name == "accuracy" and stage.labelled_per_batch:
            value = result["accuracy"].get(split)
        elif name in METHODS[stage.method.name].image_metrics:
            value = result["held_out"].get(name)
        else:
            value = read_last_logged(instance, name)
        return None if value is None else float(value)

    def describe(self, stage: Pretrain, results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        method = METHODS[stage.method.name]
        yield "method", method.title
        yield "paper", method.paper

    def list_warnings(self, name: str, stage: Pretrain) -> tuple[str, ...]:
        found = list_method_warnings(stage.method.name, constructor_arguments(stage.method))
        return tuple(f"stages.{name}.method.{line}" for line in found)

    def deviations(self, stage: Pretrain) -> tuple[str, ...]:
        return tuple(METHODS[stage.method.name].deviations)

    def objectives(self, stage: Pretrain) -> tuple[str, ...]:
        accuracy = ("accuracy",) if batch_requirements_of(stage).labels else ()
        return ("loss", *accuracy, *(MONITOR_OBJECTIVES if stage.watch.every else ()))

    def is_share_objective(self, stage: Pretrain, name: str) -> bool:
        return name in ("accuracy", "watch_knn")

    def logs_objective(self, stage: Pretrain, name: str) -> bool:
        return not (name == "accuracy" and batch_requirements_of(stage).labels)

    def check_objective(self, where: str, stage: Pretrain, name: str, objective: str) -> None:
        metric = objective.partition(".")[2]
        if metric.startswith("watch_") and not stage.watch.every:
            raise UserError(
                f"{where}: {objective!r} is not logged: stages.{name}.watch.every is 0; valid: 1 or more, e.g. in "
                "overrides"
            )
        # The terms of a method's loss are known only once it runs.
        if not metric or metric.startswith("watch_"):
            super().check_objective(where, stage, name, objective)

    def read_objective(self, stage: Pretrain, name: str, instance: StageInstance) -> float:
        """Returns the accuracy of the method's own classifier, or the last value of what it logs.

        Raises:
            StopTraining: the training does not log it; names what there is.
        """
        if not self.logs_objective(stage, name):
            result = instance.result
            assert result is not None
            return float(result["accuracy"]["val"])
        value = read_last_logged(instance, name)
        if value is None:
            logged = {key for row in read_metrics(instance.folder / METRICS_FILE) for key in row} - COUNTERS
            raise StopTraining(f"{instance.stage}.{name}: is not logged; {suggest_valid(name, logged)}")
        return value

    def streamed_batches(self, stage: Pretrain, workers: int) -> list[tuple[int, int]]:
        scored = [(max(stage.batch_size, 256), 1)] if stage.labelled_per_batch else []
        return [*scored, (stage.batch_size // workers, batch_requirements_of(stage).views)]

    def table_bytes(self, stage: Pretrain, encoder: Callable[[], Encoder], classes: int) -> int:
        method = build_small_method(stage, encoder(), classes)
        own = (value for value in vars(method).values() if isinstance(value, SampleTable))
        return sum(table.values.nbytes for table in {*method.tables.values(), *own}) // TABLE_ROWS

    def count_epoch_images(self, stage: Pretrain, splits: Splits, seed: int) -> tuple[int, int]:
        images, batch, labelled = len(splits.train), stage.batch_size, stage.labelled_per_batch
        if labelled == batch:
            return len(splits.labelled_subset(stage, seed)), batch
        if labelled:
            return _count_unlabelled(stage, images - len(splits.labelled_subset(stage, seed))), batch - labelled
        return images, batch

    def count_labelled_images(self, stage: Pretrain, splits: Splits, seed: int) -> tuple[int, int] | None:
        labelled = stage.labelled_per_batch
        is_mixed = 0 < labelled < stage.batch_size
        return (len(splits.labelled_subset(stage, seed)), labelled) if is_mixed else None


def read_last_logged(instance: StageInstance, name: str) -> float | None:
    """Returns the last value that a training logged of a number, None if it logged none."""
    values = [row[name] for row in read_metrics(instance.folder / METRICS_FILE) if name in row]
    return float(values[-1]) if values else None


def _count_images(where: str, stage: Pretrain, splits: Splits, seed: int) -> int:
    """Returns the number of images that the stage trains on."""
    if not stage.labelled_per_batch:
        return len(splits.train)
    labelled = count_labelled(where, stage, splits, seed, "label")
    rest = len(splits.train) - labelled
    if stage.max_unlabelled is not None and stage.max_unlabelled > rest:
        raise UserError(
            f"{where}.max_unlabelled: {stage.max_unlabelled} is more than the {rest} training images beside the "
            f"{labelled} labelled ones; valid: 1 to {rest}, or null"
        )
    return _check_mixture(where, stage, labelled, _count_unlabelled(stage, rest))


def _count_unlabelled(stage: Pretrain, rest: int) -> int:
    """Returns how many of the `rest`, the training images beside the labelled ones, the stage trains on."""
    return rest if stage.max_unlabelled is None else min(stage.max_unlabelled, rest)


def _check_mixture(where: str, stage: Pretrain, labelled: int, rest: int) -> int:
    """Checks a batch of labelled and unlabelled images. Returns how many images a semi-supervised pretraining trains
    on.
    """
    wanted = stage.batch_size - stage.labelled_per_batch
    if stage.labelled_per_batch > labelled:
        raise UserError(
            f"{where}.labelled_per_batch: {stage.labelled_per_batch} is more than the {labelled} labelled images "
            "there are"
        )
    if wanted > rest:
        raise UserError(
            f"{where}.labelled_per_batch: {stage.labelled_per_batch} leaves {wanted} images of a batch to the {rest} "
            "without a label that there are; "
            f"valid: fewer labels (e.g. a smaller labels_per_class), or {stage.batch_size} (labelled images only)"
        )
    return labelled + rest if wanted else labelled


def _check_method(where: str, stage: Pretrain, recipe: Recipe, encoder: Encoder, classes: int) -> Method:
    """Checks what batches hold against what the method needs. Returns the method, over a small table."""
    required, labelled = batch_requirements_of(stage), stage.labelled_per_batch
    if labelled > stage.batch_size:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is more than batch_size: {stage.batch_size}; valid: 0 to "
            f"{stage.batch_size}"
        )
    if required.labels and not labelled:
        raise UserError(
            f"{where}.labelled_per_batch: 0 is not valid: the method, as it is set, learns from labels; valid: 1 to "
            f"{stage.batch_size}"
        )
    if labelled and not required.labels:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is not valid: the method, as it is set, looks at no label; "
            "valid: 0"
        )
    if labelled and not classes:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is not valid: dataset.name {recipe.dataset.name!r} has no "
            "labels; valid: 0"
        )
    for key, value in stage.labels_given.items() if not labelled else ():
        raise UserError(f"{where}.{key}: {value!r} is not valid without labelled_per_batch; valid: null")
    if stage.max_unlabelled is not None and not 0 < labelled < stage.batch_size:
        raise UserError(
            f"{where}.max_unlabelled: {stage.max_unlabelled} is not valid with labelled_per_batch: {labelled}: a batch "
            "does not have both kinds of images; valid: null"
        )
    if stage.first_view == "plain" and required.views == 1:
        raise UserError(
            f"{where}.first_view: 'plain' is not valid: the method, as it is set, takes one view; valid: augmented"
        )
    try:
        if stage.epochs is not None:
            check_method_length(stage.method.name, stage.epochs, False, constructor_arguments(stage.method))
        return build_small_method(stage, encoder, classes)
    except ValueError as error:
        raise UserError(str(error) if str(error).startswith("encoder.") else f"{where}.method.{error}") from None


def build_small_method(stage: Pretrain, encoder: Encoder, classes: int) -> Method:
    """Builds the method over a small table.

    Raises:
        ValueError: its settings do not fit the encoder.
    """
    # The number of epochs decides no shape; with a length in steps it is not known before the images are.
    info = TrainingInfo(TABLE_ROWS, stage.epochs or 1, 0, classes, torch.full((TABLE_ROWS,), -1))
    return build_method(stage.method.name, encoder, info, constructor_arguments(stage.method))


def count_steps_per_epoch(stage: Pretrain, splits: Splits, seed: int) -> int:
    """Returns the number of steps in a whole epoch of the training of a seed."""
    images, batch = PretrainStage().count_epoch_images(stage, splits, seed)
    return images // batch


def _check_steps(where: str, stage: Pretrain, splits: Splits, seed: int) -> None:
    """Checks a length in steps against the method, which may need a number of whole epochs."""
    if stage.steps is None:
        return
    per_epoch = count_steps_per_epoch(stage, splits, seed)
    epochs, name = stage.length.count_epochs(per_epoch), stage.method.name
    try:
        check_method_length(name, epochs, stage.steps % per_epoch > 0, constructor_arguments(stage.method))
    except ValueError as error:
        raise UserError(f"{where}.method.{error}; {where}.steps: {stage.steps}, {per_epoch} in an epoch") from None

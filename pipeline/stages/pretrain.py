"""The stage `pretrain`: an encoder from images without labels, or with some. Labels that the stage does not ask for are
withheld from the method.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import View, constructor_arguments
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import StopTraining, UserError, suggest_valid
from firstlight.pipeline.records import Count, RecordShape, Share
from firstlight.pipeline.stages.artifacts.companions import TEACHER, save_network
from firstlight.pipeline.stages.artifacts.encoder_description import TRAINED_ON_ALL_KEY, WEIGHTS_ORIGIN_KEY
from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.artifacts.table_folder import SavedTable, save_table
from firstlight.pipeline.stages.artifacts.weights_origin import trace_teacher, trace_weights
from firstlight.pipeline.stages.checks import check_batch_images, check_made_network, check_test_split
from firstlight.pipeline.stages.features.nearest import find_nearest
from firstlight.pipeline.stages.pictures import (
    FILTERS_FILE,
    PICTURES_FILE,
    PRETRAINED_FILTERS,
    pair_with_untrained,
    save_filters,
    save_pictures,
)
from firstlight.pipeline.stages.pretraining.checks import (
    check_pretrain_images,
    check_pretrain_method,
    check_pretrain_steps,
    count_pretrain_images,
)
from firstlight.pipeline.stages.pretraining.job import (
    TABLE_ROWS,
    batch_requirements_of,
    build_job,
    build_seeded_method,
    build_small_method,
    count_epoch_images,
)
from firstlight.pipeline.stages.pretraining.measuring import (
    compute_held_out_features,
    draw_method_pictures,
    measure_held_out,
    save_pretrain_map,
    score_classifier,
)
from firstlight.pipeline.stages.pretraining.views import list_dropped_ops, list_views
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import (
    MeasuringPeriod,
    RecipeContext,
    StageKind,
    StageOutput,
    StreamedBatch,
)
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, STEPS_PER_EPOCH_KEY, read_metrics
from firstlight.pipeline.train.monitor import FeatureMonitor as Monitor
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.feature_metrics import FEATURE_METRICS
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, list_method_warnings
from firstlight.tasks.sample_table import SampleTable

# The feature metrics that a training logs on the way, where `watch.every` asks for it.
MONITOR_OBJECTIVES = (*(f"watch_{name}" for name in FEATURE_METRICS), "watch_knn", "watch_alignment")
# The metrics that every training logs and that no trial can be judged by.
COUNTERS = {"step", "of", "epoch", STEPS_PER_EPOCH_KEY, "time", "images_per_s", "images_per_cpu_s", "data_wait", "lr"}


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

    def list_views(self, stage: Pretrain, dataset: DatasetOptions) -> list[View]:
        return list_views(stage, dataset)

    def train(self, context: StageContext, stage: Pretrain, instance: StageInstance) -> None:
        training = build_job(context, stage, instance)
        fit(training, build_seeded_method(context, stage, training))

    def outputs(self, stage: Pretrain, instance: StageInstance) -> list[StageOutput]:
        folder = instance.folder / "encoder"
        return [StageOutput("encoder", folder, f'fl.load_encoder("{folder}")')]

    def run(self, context: StageContext, stage: Pretrain, instance: StageInstance) -> None:
        """Trains, and writes `encoder/`, the method's other networks and tables, pictures and `result.json` into the
        instance's folder.

        It is called on every worker.
        """
        training = build_job(context, stage, instance)
        teacher = instance.companions.get(TEACHER)
        assert (teacher is None) == (stage.teacher is None)
        method = build_seeded_method(context, stage, training, instance.encoder, teacher)
        # The method is on the CPU until `fit` places it.
        untrained = draw_method_pictures(context, stage, method, instance, torch.device("cpu"))
        fit(training, method, Monitor(context, stage, stage.watch, training, method))
        accuracy, image_metrics = score_classifier(context, stage, method), measure_held_out(context, stage, method)
        held_out = compute_held_out_features(context, stage, method)
        values = {name: table.gather_values() for name, table in method.exported_tables().items()}
        if rank() == 0:
            facts = {"method": stage.method.model_dump(mode="json"), "store": context.store.hash, "seed": instance.seed}
            # Later recipes draw test and held-out images of the same store, which were trained on here
            facts |= {TRAINED_ON_ALL_KEY: True} if not len(context.splits.val) and not len(context.splits.test) else {}
            origin = trace_weights(context.recipe, instance.stage, instance.encoder) if instance.encoder else {}
            origin_facts: dict[str, Any] = {WEIGHTS_ORIGIN_KEY: origin} if origin else {}
            origin_facts |= {} if teacher is None else {TEACHER: trace_teacher(teacher, stage.teacher.weights)}
            save_encoder(method.exported_encoder(), instance.folder / "encoder", {**facts, **origin_facts})
            for name, network in method.exported_networks().items():
                save_network(network, instance.folder / name, facts)
            for name, rows in values.items():
                save_table(SavedTable(training.plan.ids, rows, context.store.hash), instance.folder / name, facts)
            save_pictures(
                pair_with_untrained(untrained, draw_method_pictures(context, stage, method, instance, context.device)),
                instance.folder / PICTURES_FILE,
            )
            save_filters(
                {PRETRAINED_FILTERS: method.exported_encoder().compose_first_filters()}, instance.folder / FILTERS_FILE
            )
            result = {
                "images": len(training.plan.ids),
                "handed_on": sorted([*method.exported_networks(), *values]),
                "accuracy": accuracy,
                "held_out": image_metrics,
            }
            if held_out is not None:
                result["neighbours"] = find_nearest(*held_out, context.splits.labels)
                save_pretrain_map(instance, *held_out)
            instance.write_result(result)
        barrier()

    def result_shape(self, stage: Pretrain) -> TypeAdapter[Any]:
        return PRETRAIN_SHAPE

    def check_source(self, name: str, stage: Pretrain, context: RecipeContext) -> None:
        if stage.pictures == "test":
            check_test_split(f"stages.{name}.pictures", context)
        classes = 0 if context.source.annotations else len(context.source.classes)
        method = check_pretrain_method(f"stages.{name}", stage, context.recipe, context.encoder, classes)
        networks = context.networks[name] = method.exported_networks()
        context.tables[name] = frozenset(method.exported_tables())
        if stage.watch.every and stage.watch.features == "head":
            check_made_network(f"stages.{name}.watch.features", "head", context.recipe, name, networks)

    def check_images(self, name: str, stage: Pretrain, recipe: Recipe, splits: Splits) -> None:
        for seed in recipe.seeds:
            images = count_pretrain_images(f"stages.{name}", stage, splits, seed)
            check_batch_images(f"stages.{name}", stage, images)
            check_pretrain_images(f"stages.{name}", stage, images)
            check_pretrain_steps(f"stages.{name}", stage, splits, seed)
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

    def list_image_notes(self, name: str, stage: Pretrain, dataset: DatasetOptions) -> tuple[str, ...]:
        """Returns a line about augmentations of the method that would change colours which images have no longer."""
        dropped = list_dropped_ops(stage, dataset)
        what = f"{stage.method.name} adds augmentations that mix colours, which are left out with dataset.channels"
        return (f"stages.{name}.method: {what}: {', '.join(dropped)}",) if dropped else ()

    def deviations(self, stage: Pretrain) -> tuple[str, ...]:
        return tuple(METHODS[stage.method.name].deviations)

    def objectives(self, stage: Pretrain) -> tuple[str, ...]:
        accuracy = ("accuracy",) if batch_requirements_of(stage).labels else ()
        return ("loss", *accuracy, *(MONITOR_OBJECTIVES if stage.watch.every else ()))

    def is_share_objective(self, stage: Pretrain, name: str) -> bool:
        return name in ("accuracy", "watch_knn")

    def logs_objective(self, stage: Pretrain, name: str) -> bool:
        return not (name == "accuracy" and batch_requirements_of(stage).labels)

    def find_measuring_period(self, stage: Pretrain, name: str) -> MeasuringPeriod | None:
        return MeasuringPeriod(stage.watch.every, "watch.every") if name.startswith("watch_") else None

    def list_checkpoint_shapes(self, stage: Pretrain, recipe: Recipe, classes: int) -> dict[str, tuple[int, ...]]:
        method = build_small_method(stage, Encoder(recipe.network_spec, recipe.dataset.image_size), classes)
        shapes = {name: tuple(tensor.shape) for name, tensor in method.state_dict().items()}
        for table, state in method.tables.items():
            shapes |= {f"{table}/{name}": tuple(tensor.shape) for name, tensor in state.state_dict().items()}
        return shapes

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

    def streamed_batches(self, stage: Pretrain, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        scored = [(max(stage.batch_size, 256), [dataset.image_size])] if stage.labelled_per_batch else []
        return [*scored, (stage.batch_size // workers, [view.size for view in list_views(stage, dataset)])]

    def table_bytes(self, stage: Pretrain, encoder: Callable[[], Encoder], classes: int) -> int:
        method = build_small_method(stage, encoder(), classes)
        own = (value for value in vars(method).values() if isinstance(value, SampleTable))
        return sum(table.values.nbytes for table in {*method.tables.values(), *own}) // TABLE_ROWS

    def count_epoch_images(self, stage: Pretrain, splits: Splits, seed: int) -> tuple[int, int]:
        return count_epoch_images(stage, splits, seed)

    def count_labelled_images(self, stage: Pretrain, splits: Splits, seed: int) -> tuple[int, int] | None:
        labelled = stage.labelled_per_batch
        is_mixed = 0 < labelled < stage.batch_size
        return (len(splits.labelled_subset(stage, seed)), labelled) if is_mixed else None


def read_last_logged(instance: StageInstance, name: str) -> float | None:
    """Returns the last value that a training logged of a number, None if it logged none."""
    values = [row[name] for row in read_metrics(instance.folder / METRICS_FILE) if name in row]
    return float(values[-1]) if values else None

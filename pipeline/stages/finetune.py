"""The stage `finetune`: a downstream task from the pretrained encoder, from the weights that the recipe names, and from
scratch, with the same images, epochs and choice of settings.

All arms try the same learning rates. Each arm's rate is chosen on held-out images; then the test split is read once,
with the chosen rate.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, create_model

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.records import Count, RecordShape
from firstlight.pipeline.stages.artifacts.companions import load_decoder
from firstlight.pipeline.stages.checks import (
    check_batch_images,
    check_scored_images,
    check_target,
    check_test_split,
    count_labelled,
)
from firstlight.pipeline.stages.finetuning.candidates import choose_candidates, list_candidates
from firstlight.pipeline.stages.finetuning.checks import check_class_groups, check_decoder, check_finetune_task
from firstlight.pipeline.stages.finetuning.job import finetune_ids
from firstlight.pipeline.stages.finetuning.kept_scores import (
    find_scores,
    forget_scores,
    keep_scores,
    read_kept_scores,
)
from firstlight.pipeline.stages.finetuning.saving import save_arm_models, save_predictions
from firstlight.pipeline.stages.finetuning.scoring import count_scored_classes, read_number
from firstlight.pipeline.stages.finetuning.trainings import train_candidate, train_candidates
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FOLDER
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import MetricsFile, RecipeContext, StageKind, StageOutput, StreamedBatch
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream import TASKS


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
        """Writes `result.json` and pictures into the instance's folder. It is called on every worker."""
        tasks = train_candidates(context, stage, instance)
        measure = TASKS[stage.task.name].measure
        held_out = find_scores(context, stage, instance, tasks, "val")
        best = choose_candidates(stage, held_out)
        chosen = {name: tasks[name] for name in best.values()}
        scored = {
            "val": held_out,
            **({"test": find_scores(context, stage, instance, chosen, "test")} if context.recipe.score_test else {}),
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
                save_predictions(context, stage, tasks[name], instance.folder / f"{arm}.safetensors")
            save_arm_models(context, stage, instance, {arm: tasks[name] for arm, name in best.items()}, result)
            # They are found again after a kill in between. After the result nobody would remove them.
            forget_scores(instance, tasks)
            instance.write_result(result)
        barrier()

    def list_rounds(self, stage: Finetune) -> tuple[tuple[str, ...], ...]:
        """Returns the trainings, one for each arm and learning rate, and then the arms, where there are several."""
        return tuple(parts for parts in (tuple(list_candidates(stage)), stage.compared_arms) if len(parts) > 1)

    def run_part(self, context: StageContext, stage: Finetune, instance: StageInstance, part: str) -> None:
        """Trains a network and scores it on held-out images, or scores the chosen one of an arm on test images."""
        if part in stage.compared_arms:
            self._score_chosen(context, stage, instance, part)
        elif (task := train_candidate(context, stage, instance, part)) is not None:
            keep_scores(context, stage, instance, part, task, "val")

    def _score_chosen(self, context: StageContext, stage: Finetune, instance: StageInstance, arm: str) -> None:
        held_out = {name: read_kept_scores(instance, name, "val") for name in list_candidates(stage)}
        known = {name: scores for name, scores in held_out.items() if scores is not None}
        # Only one of two trainings that are the same has scores. Then `run` scores the arms, as it knows which one.
        if not context.recipe.score_test or len(known) < len(held_out):
            return
        chosen = choose_candidates(stage, known)[arm]
        task = train_candidate(context, stage, instance, chosen)
        assert task is not None
        keep_scores(context, stage, instance, chosen, task, "test")

    def count_trainings(self, stage: Finetune) -> int:
        return len(list_candidates(stage))

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
        check_finetune_task(name, stage, context)
        check_class_groups(where, stage, context.source.classes)

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
        return read_number(found[measure.name]) if measure.name in found else None

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
        return read_number(result[name or stage.compared_arms[0]]["val"])

    def streamed_batches(self, stage: Finetune, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        return [(images, [dataset.image_size]) for images in (max(stage.batch_size, 256), stage.batch_size // workers)]

    def count_epoch_images(self, stage: Finetune, splits: Splits, seed: int) -> tuple[int, int]:
        target = TASKS[stage.task.name].target
        return len(splits.labelled_subset(stage, seed, target)), stage.batch_size

"""The contract of a kind of stage has defaults for all but the work, and checks results."""

import math
from pathlib import Path
from typing import Any, Literal

import pytest

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.stages import StageConfig, TrainingOptions
from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.records import DamagedRecord
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import MetricsFile, StageKind
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes

SCORES = {"pretrained": {"share": {"val": 0.5, "test": 0.25}}, "random": {"share": {"val": 0.125}}}


class Plain(StageConfig):
    """A section that says nothing but its measures."""

    kind: Literal["plain"] = "plain"

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (Measure("share", "a share", ("pretrained", "random")), Measure("loss", "loss", only_if_expected=True))


class PlainTraining(StageConfig, TrainingOptions):
    """A section with a training."""

    kind: Literal["plain_training"] = "plain_training"


class PlainStage(StageKind[Any]):
    """A kind that says nothing."""

    section = Plain

    def run(self, context: StageContext, stage: Any, instance: StageInstance) -> None:
        raise AssertionError


KIND, STAGE = PlainStage(), Plain()


def make_training() -> PlainTraining:
    optimizer = recipes.RECIPE["stages"]["pretrain"]["optimizer"]
    return PlainTraining.model_validate({"epochs": 2, "batch_size": 8, "optimizer": optimizer})


def finish(folder: Path, result: dict[str, Any]) -> StageInstance:
    instance = StageInstance("plain", 0, "f", folder)
    instance.write_result(result)
    return instance


def test_kind_that_says_nothing_runs_on_workers_and_logs_one_file(tmp_path: Path) -> None:
    instance = StageInstance("plain", 0, "f", tmp_path)
    assert KIND.runs_on == "workers"
    assert KIND.metrics_files(STAGE, instance) == [MetricsFile(tmp_path / "metrics.jsonl", "plain seed 0")]


def test_kind_that_says_nothing_has_no_notes_outputs_or_facts(tmp_path: Path) -> None:
    recipe, instance = recipes.recipe(tmp_path), StageInstance("plain", 0, "f", tmp_path)
    assert KIND.list_deciding_facts(STAGE, recipe) == {}
    assert KIND.list_warnings("plain", STAGE) == KIND.deviations(STAGE) == ()
    assert KIND.list_image_notes("plain", STAGE, recipe.dataset) == ()
    assert KIND.outputs(STAGE, instance) == list(KIND.describe(STAGE, [])) == []


def test_kind_that_says_nothing_trains_nothing_and_needs_no_memory(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path)
    splits = draw_splits(digits, recipe.dataset)
    assert KIND.count_trainings(STAGE) == KIND.table_bytes(STAGE, lambda: pytest.fail("is built"), 10) == 0
    assert KIND.list_views(STAGE, recipe.dataset) == KIND.streamed_batches(STAGE, recipe.dataset, 1) == []
    assert KIND.count_epoch_images(STAGE, splits, 0) is KIND.count_labelled_images(STAGE, splits, 0) is None
    assert KIND.list_checkpoint_shapes(STAGE, recipe, 10) == {}
    with pytest.raises(NotImplementedError, match="plain"):
        KIND.train(StageContext.create(recipe, digits, on_ray=False), STAGE, StageInstance("plain", 0, "f", tmp_path))


def test_training_has_one_view_of_its_own_augmentations_or_of_the_data_set(tmp_path: Path) -> None:
    dataset, stage = recipes.recipe(tmp_path).dataset, make_training()
    assert KIND.count_trainings(stage) == 1
    assert KIND.list_views(stage, dataset) == [(dataset.train_augment, 8)]
    own = stage.model_copy(update={"augment": dataset.eval_augment})
    assert KIND.list_views(own, dataset) == [(dataset.eval_augment, 8)]


def test_searches_judge_by_the_measures_on_held_out_images(tmp_path: Path) -> None:
    assert KIND.objectives(STAGE) == ("share", "loss")
    assert KIND.is_share_objective(STAGE, "share")
    assert not KIND.is_share_objective(STAGE, "loss")
    assert not KIND.logs_objective(STAGE, "share")
    assert KIND.find_measuring_period(STAGE, "share") is None
    assert KIND.read_objective(STAGE, "share", finish(tmp_path, SCORES)) == 0.5
    with pytest.raises(UserError, match=r"^objectives\.0\.measure: 'p\.shore' is not measured; did you mean 'p\.share"):
        KIND.check_objective("objectives.0.measure", STAGE, "p", "p.shore")


def test_scores_are_read_by_arm_measure_and_split(tmp_path: Path) -> None:
    instance, (measure, _) = finish(tmp_path, SCORES), STAGE.measures
    read = {arm: KIND.read_score(STAGE, measure, arm, "test", instance) for arm in measure.arms}
    assert read == {"pretrained": 0.25, "random": None}
    assert KIND.label_measure(STAGE, measure, SCORES) == "a share"
    KIND.check_result(STAGE, instance)


@pytest.mark.parametrize(
    ("value", "problem"),
    [(1.5, "share of random is 1.5; valid: 0 to 1"), ("high", "share of random: ValueError could not convert string")],
)
def test_score_that_cannot_be_is_damage(tmp_path: Path, value: Any, problem: str) -> None:
    instance = finish(tmp_path, {**SCORES, "random": {"share": {"val": value}}})
    with pytest.raises(DamagedRecord) as caught:
        KIND.check_result(STAGE, instance)
    assert str(caught.value).startswith(f"{instance.result_file}: is damaged: {problem}")


def test_missing_score_and_missing_result_are_no_damage(tmp_path: Path) -> None:
    KIND.check_result(STAGE, StageInstance("plain", 0, "f", tmp_path / "none"))
    KIND.check_result(STAGE, finish(tmp_path, {**SCORES, "random": {"share": {"val": math.nan}}}))

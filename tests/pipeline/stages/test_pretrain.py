"""The kind of stage `pretrain` as others see it; what a training does is tested in `pretraining` and with recipes."""

import re
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StopTraining, UserError
from firstlight.pipeline.stages.pretrain import PretrainStage, read_last_logged
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE, append_row, read_metrics
from tests.support import recipes

KIND = PretrainStage()
CLUSTERING = {"method": {"name": "clustering_locality"}, "labelled_per_batch": 8, "labels_per_class": 4}


def read_stage(folder: Path, **keys: Any) -> tuple[Recipe, Pretrain]:
    recipe = recipes.recipe(folder, **{f"stages__pretrain__{key}": value for key, value in keys.items()})
    stage = recipe.stages["pretrain"]
    assert isinstance(stage, Pretrain)
    return recipe, stage


def log_rows(folder: Path, *losses: float, **numbers: float) -> StageInstance:
    for k, loss in enumerate(losses):
        row = {"step": k + 1, "of": len(losses), "loss": loss, "images_per_s": 1.0, "time": float(k)}
        append_row(folder, {**row, **numbers})
    return StageInstance("pretrain", 0, "f", folder)


def test_last_logged_value_is_the_score(tmp_path: Path) -> None:
    _, stage = read_stage(tmp_path)
    instance = log_rows(tmp_path, 0.75, 0.5, moved=0.25)
    assert KIND.read_objective(stage, "loss", instance) == read_last_logged(instance, "loss") == 0.5
    assert KIND.read_score(stage, Measure("moved", ""), "pretrained", "val", instance) == 0.25
    assert read_last_logged(instance, "psnr") is None
    with pytest.raises(StopTraining, match=r"^pretrain\.mowed: is not logged; did you mean 'moved'"):
        KIND.read_objective(stage, "mowed", instance)


def test_own_classifier_is_read_from_the_result(tmp_path: Path) -> None:
    _, stage = read_stage(tmp_path, **CLUSTERING)
    instance = log_rows(tmp_path, 0.5)
    instance.write_result({"images": 1, "handed_on": [], "accuracy": {"val": 0.25, "test": 0.5}, "held_out": {}})
    assert KIND.read_objective(stage, "accuracy", instance) == 0.25
    assert KIND.read_score(stage, stage.measures[0], "pretrained", "test", instance) == 0.5
    assert not KIND.logs_objective(stage, "accuracy")
    assert KIND.logs_objective(stage, "loss")


def test_watched_numbers_are_objectives_where_they_are_measured(tmp_path: Path) -> None:
    _, plain = read_stage(tmp_path)
    _, watching = read_stage(tmp_path, watch={"every": 2})
    assert KIND.objectives(plain) == ("loss",)
    assert {"loss", "watch_knn"} <= set(KIND.objectives(watching))
    assert KIND.find_measuring_period(watching, "watch_knn") == (2, "watch.every")
    assert KIND.find_measuring_period(watching, "loss") is None
    with pytest.raises(
        UserError, match=r"^x: 'pretrain\.watch_knn' is not logged: stages\.pretrain\.watch\.every is 0"
    ):
        KIND.check_objective("x", plain, "pretrain", "pretrain.watch_knn")


def test_checkpoint_has_the_shapes_of_networks_and_tables(tmp_path: Path) -> None:
    recipe, stage = read_stage(tmp_path)
    shapes = KIND.list_checkpoint_shapes(stage, recipe, 10)
    assert any(name.startswith("encoder.") for name in shapes)
    assert any("/" in name for name in shapes), "those of tables"
    wider = recipes.recipe(tmp_path, encoder__width=8)
    assert KIND.list_checkpoint_shapes(stage, wider, 10) != shapes


def test_training_alone_leaves_its_log_and_no_result(tmp_path: Path, digits: Store) -> None:
    recipe, stage = read_stage(tmp_path, epochs=None, steps=2)
    instance = StageInstance("pretrain", 0, "f", tmp_path / "pretrain")
    KIND.train(StageContext.create(recipe, digits, on_ray=False), stage, instance)
    assert [row["step"] for row in read_metrics(instance.folder / METRICS_FILE)] == [1, 2]
    assert instance.result is None
    assert not (instance.folder / "encoder").exists()


def test_mixed_batches_are_counted_beside_the_epochs(tmp_path: Path, digits: Store) -> None:
    recipe, stage = read_stage(tmp_path, **CLUSTERING)
    splits = draw_splits(digits, recipe.dataset)
    assert KIND.count_labelled_images(stage, splits, 0) == (40, 8)
    assert KIND.count_epoch_images(stage, splits, 0) == (len(splits.train) - 40, 24)
    _, plain = read_stage(tmp_path)
    assert KIND.count_labelled_images(plain, splits, 0) is None


def test_batch_that_is_larger_than_the_images_is_refused(tmp_path: Path, digits: Store) -> None:
    recipe, stage = read_stage(tmp_path, batch_size=500)
    splits = draw_splits(digits, recipe.dataset)
    message = f"stages.pretrain.batch_size: 500 is more than the {len(splits.train)} images it would train on"
    with pytest.raises(UserError, match="^" + re.escape(message)):
        KIND.check_images("pretrain", stage, recipe, splits)


def test_method_is_described_by_its_title_and_paper(tmp_path: Path) -> None:
    _, stage = read_stage(tmp_path)
    described = dict(KIND.describe(stage, []))
    assert set(described) == {"method", "paper"}
    (output,) = KIND.outputs(stage, StageInstance("pretrain", 0, "f", tmp_path))
    assert output.path == tmp_path / "encoder"

"""A search against its recipe: which keys, measures and populations are refused, on one line with the dotted key."""

import json
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.search.checks import check_search, load_checked_plan
from tests.support import recipes
from tests.support.searches import LR, PERIOD, make_plan, write_files

PBT: dict[str, Any] = {"name": "pbt", "measure": "pretrain.loss", "mode": "min", "interval": 1}
EPOCHS = {"stages.finetune.epochs": {"choice": [1, 2]}}
IN_STEPS = {"stages.pretrain.epochs": None, "stages.pretrain.steps": 8}


def assert_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(folder, **changes)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"stages.pretrain.optimizer.lrr": {"choice": [1.0]}}},
            "space.stages.pretrain.optimizer: lrr is not a parameter of SGD; valid: ",
        ),
        (
            {"space": {"stages.pretrian.epochs": {"choice": [1]}}},
            "space.stages.pretrian: no such stage in this recipe; did you mean 'pretrain'?",
        ),
        ({"space": {PERIOD: {"choice": [1, 0]}}}, f"space.{PERIOD}: 0 is not valid"),
        ({"space": {PERIOD: {"choice": [1, "two"]}}}, f'space.{PERIOD}: "two" is not valid'),
        ({"space": EPOCHS}, "space.stages.finetune.epochs: changes no objective: a trial runs the stages "),
        ({"space": {"dataset.split_seed": {"choice": [1, 2]}}}, "space.dataset.split_seed: cannot be searched"),
        ({"space": {"seeds": {"choice": [[1], [2]]}}}, "space.seeds: cannot be searched"),
        ({"space": {"stages..epochs": {"choice": [1, 2]}}}, "space.stages..epochs: is no dotted key"),
        ({"overrides": {LR: 0.5}}, f"space.{LR}: is searched, and '{LR}' sets it at the same time"),
        ({"overrides": {"stages.pretrain.epoch": 5}}, "stages.pretrain.epoch: unknown key; did you mean 'epochs'?"),
    ],
)
def test_key_that_cannot_be_searched_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert_refused(tmp_path, changes, message)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ("evalute.knn", "'evalute.knn': the recipe has no stage 'evalute'"),
        ("evaluate.kNN", "'evaluate.kNN' is not measured; did you mean 'evaluate.knn'?"),
        ("evaluate", "'evaluate' is not measured; "),
        ("finetune.he", "'finetune.he' is not measured; "),
        ("pretrain.watch_knn", "'pretrain.watch_knn' is not logged: stages.pretrain.watch"),
    ],
)
def test_unknown_measure_is_refused(tmp_path: Path, measure: str, message: str) -> None:
    assert_refused(tmp_path, {"objectives": [{"measure": measure}]}, f"objectives.0.measure: {message}")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("asha", "'evaluate.knn' is known only at the end of a trial"),
        ({"name": "asha", "measure": "pretrain.watch_knn"}, "'pretrain.watch_knn' is not logged"),
    ],
)
def test_scheduler_needs_a_measure_that_is_logged(tmp_path: Path, scheduler: Any, message: str) -> None:
    assert_refused(tmp_path, {"scheduler": scheduler}, f"scheduler.measure: {message}")


def test_promotion_needs_a_trial_that_makes_the_encoder(tmp_path: Path) -> None:
    changes = {
        "objectives": [{"measure": "finetune.scratch"}],
        "stages": {"finetune": {"arms": ["scratch"]}},
        "promote": {"name": "x"},
        "space": EPOCHS,
    }
    assert_refused(tmp_path, changes, "promote: no stage of a trial makes the encoder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scheduler": {**PBT, "interval": 2}},
            "scheduler.interval: 2 is not valid: stages.pretrain trains 2 epochs",
        ),
        (
            {"scheduler": {**PBT, "interval": 8}, "overrides": IN_STEPS},
            "scheduler.interval: 8 is not valid: stages.pretrain trains 8 steps",
        ),
        (
            {"space": {"stages.pretrain.batch_size": {"choice": [10, 20]}}},
            "space.stages.pretrain.batch_size: cannot change in the middle of a training",
        ),
        (
            {"space": {"stages.pretrain.optimizer.name": {"choice": ["SGD", "Adam"]}}},
            "space.stages.pretrain.optimizer.name: cannot change in the middle",
        ),
        (
            {"space": {"encoder.width": {"choice": [4, 8]}}},
            "space.encoder.width: cannot change in the middle of a training",
        ),
        ({"overrides": {"seeds": [0, 1]}}, "seeds: [0, 1]: scheduler: pbt trains one network"),
        (
            {
                "overrides": {"stages.pretrain.epochs": 6, "stages.pretrain.watch.every": 2},
                "scheduler": {**PBT, "measure": "pretrain.watch_rankme", "interval": 3},
            },
            "scheduler.interval: 3 is not valid: pretrain.watch_rankme is known every 2 epochs",
        ),
        (
            {"overrides": {"stages.pretrain.schedule": {"name": "ReduceLROnPlateau", "interval": "epoch"}}},
            "stages.pretrain.schedule.name: 'ReduceLROnPlateau' is not valid with scheduler: pbt",
        ),
    ],
)
def test_population_that_cannot_exchange_networks_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert_refused(tmp_path, {"algorithm": "random", "scheduler": PBT, **changes}, message)


def test_lengths_in_epochs_and_in_steps_cannot_be_compared(tmp_path: Path) -> None:
    section = json.loads(json.dumps(recipes.RECIPE["stages"]["pretrain"]))
    in_steps = {**section, "epochs": None, "steps": 8}
    space = {"stages.pretrain": {"choice": [section, in_steps]}}
    scheduler = {"name": "asha", "measure": "pretrain.loss", "mode": "min"}
    message = "space: some trials have stages.pretrain.epochs and others stages.pretrain.steps, which scheduler: asha"
    assert_refused(tmp_path, {"space": space, "scheduler": scheduler}, message)
    assert make_plan(tmp_path, space=space)


def test_override_of_epochs_of_a_recipe_in_steps_says_what_to_do(tmp_path: Path) -> None:
    changes = {"stages": {"pretrain": {"epochs": None, "steps": 8}}, "overrides": {"stages.pretrain.epochs": 5}}
    message = "stages.pretrain: epochs: 5 and steps: 8 are both given; valid: one of them, and null for the other "
    assert_refused(tmp_path, changes, f"{message}(stages.pretrain.steps=null or stages.pretrain.epochs=null)")


def test_retrieval_of_test_images_is_no_objective(tmp_path: Path) -> None:
    file = write_files(tmp_path, objectives=[{"measure": "retrieve.precision@1"}])
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["stages"]["retrieve"] = {"kind": "retrieve"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(
        UserError, match=r"stages\.retrieve\.queries: 'test' reads test images, and score_test is false; valid: val"
    ):
        load_checked_plan(file)
    plan = load_checked_plan(file, ("stages.retrieve.queries=val",))
    assert list(plan.trial_recipe({LR: 0.1, PERIOD: 1}).stages) == ["pretrain", "retrieve"]


def test_range_of_workers_is_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "scale.workers=[1,2]")
    with pytest.raises(UserError, match=r"^scale\.workers: \[1, 2\] is not valid in a search.*; valid: one number"):
        check_search(plan, plan.trial_recipe({LR: 0.1, PERIOD: 1}))


def test_storage_in_a_bucket_is_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    recipe = recipes.recipe("s3://bucket/runs", tracking__uri="http://host:5000")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^storage: 's3://bucket/runs' is not valid for a search: .*; valid: a folder"):
        check_search(plan, recipe)

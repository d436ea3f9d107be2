"""Checks of a recipe against the images of its store, and notes about images left out."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import data_checks, preflight
from tests.support import recipes
from tests.support.folded_splits import fold_of, no_folds
from tests.support.grey_images import images

CLUSTERING = {"name": "clustering_locality"}


@pytest.mark.parametrize("labelled", [8, 32])
def test_batches_that_fit_pass(tmp_path: Path, digits: Store, labelled: int) -> None:
    changes: dict[str, Any] = {
        "stages__pretrain__method": CLUSTERING,
        "stages__pretrain__labelled_per_batch": labelled,
        "stages__pretrain__labels_per_class": 4,
    }
    recipe = recipes.recipe(tmp_path, **changes)
    preflight.check_recipe(recipe)
    splits = draw_splits(digits, recipe.dataset)
    data_checks.check_images(recipe, splits)
    changes |= {"stages__pretrain__labels_per_class": None, "stages__pretrain__labels_subset": "fold{seed}"}
    recipe = recipes.recipe(tmp_path, **changes)
    data_checks.check_images(recipe, fold_of(splits, [labelled]))
    with pytest.raises(UserError, match=f"labelled_per_batch: {labelled} is more than the {labelled - 1} labelled"):
        data_checks.check_images(recipe, fold_of(splits, [labelled - 1]))


@pytest.mark.fault(33, "batches that the images cannot fill")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled_per_batch": 8, "labels_per_class": 90}, "stages.pretrain.labels_per_class: 90 is more than the"),
        ({"labelled_per_batch": 8, "labels_subset": "fold{seed}"}, "stages.pretrain.labels_subset: 'fold0' is unknown"),
        (
            {"labelled_per_batch": 20, "labels_fraction": 0.01},
            "labelled_per_batch: 20 is more than the 10 labelled images there are",
        ),
        (
            {"labelled_per_batch": 8},
            "labelled_per_batch: 8 leaves 24 images of a batch to the 0 without a label that there are",
        ),
        (
            {"labelled_per_batch": 20, "labels_per_class": 1},
            "labelled_per_batch: 20 is more than the 10 labelled images there are",
        ),
    ],
)
def test_batches_that_the_images_cannot_fill_are_refused(
    tmp_path: Path, digits: Store, changes: dict[str, Any], message: str
) -> None:
    recipe = recipes.recipe(
        tmp_path,
        stages__pretrain__method=CLUSTERING,
        **{f"stages__pretrain__{key}": value for key, value in changes.items()},
    )
    with pytest.raises(UserError) as caught:
        data_checks.check_images(recipe, replace(draw_splits(digits, recipe.dataset), subset=no_folds))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (6, ""),
        (12, ""),
        (5, "2 epochs, the last one partial, are not 2 rounds of equal length"),
        (9, "3 epochs are not 2 rounds of equal length"),
    ],
)
def test_steps_that_are_no_whole_rounds_are_refused(tmp_path: Path, digits: Store, steps: int, problem: str) -> None:
    method = {"name": "super_and", "dim": 8, "rounds": 2}
    length = {"stages__pretrain__epochs": None, "stages__pretrain__steps": steps}
    recipe = recipes.recipe(tmp_path, stages__pretrain__method=method, **length)
    preflight.check_recipe(recipe)
    splits = draw_splits(digits, recipe.dataset)
    if not problem:
        data_checks.check_images(recipe, splits)
        return
    with pytest.raises(UserError) as caught:
        data_checks.check_images(recipe, splits)
    told = f"stages.pretrain.method.rounds: {problem}; stages.pretrain.steps: {steps}, 3 in an epoch"
    assert str(caught.value) == told


@pytest.mark.fault(33, "fewer images than a batch, for one of the seeds")
def test_every_seed_is_checked_not_only_the_first(tmp_path: Path, digits: Store) -> None:
    changes = {
        "stages__finetune__labels_per_class": None,
        "stages__finetune__labels_subset": "fold{seed}",
        "seeds": [0, 1],
    }
    recipe = recipes.recipe(tmp_path, **changes)
    splits = draw_splits(digits, recipe.dataset)
    data_checks.check_images(recipe, fold_of(splits, [30, 20]))
    with pytest.raises(
        UserError, match=r"^stages\.finetune\.batch_size: 20 is more than the 19 images it would train on$"
    ):
        data_checks.check_images(recipe, fold_of(splits, [30, 19]))


@pytest.mark.fault(34, "images of one class")
@pytest.mark.parametrize("stage", ["evaluate", "finetune"])
def test_images_of_one_class_cannot_be_scored(tmp_path: Path, stage: str) -> None:
    root = images(tmp_path / "in", 8)
    for part in ("train", "test"):
        shutil.rmtree(root / part / "b")
    recipe = recipes.recipe(
        tmp_path, dataset__name="greys", dataset__source="folder", dataset__root=str(root), dataset__max_train=None
    )
    stages = {name: kind for name, kind in recipe.stages.items() if name in ("pretrain", stage)}
    with pytest.raises(
        UserError,
        match=rf"^stages\.{stage}: all images of dataset\.root .* are 'a': there is nothing to tell apart; valid: ",
    ):
        preflight.check_recipe(recipe.model_copy(update={"stages": stages}))
    preflight.check_recipe(recipe.model_copy(update={"stages": {"pretrain": recipe.stages["pretrain"]}}))

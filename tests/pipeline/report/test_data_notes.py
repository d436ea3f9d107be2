"""Notes about images that a stage leaves out."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.data_notes import (
    describe_crops,
    describe_kept_apart,
    describe_left_out,
    describe_problems,
    describe_seen_images,
)
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.folded_splits import fold_of

CLUSTERING = {"name": "clustering_locality"}


@pytest.mark.fault(40, "what does not fill a batch is left out, and counted")
def test_images_left_out_are_noted(tmp_path: Path, digits: Store) -> None:
    changes = {
        "stages__finetune__labels_per_class": None,
        "stages__finetune__labels_subset": "fold{seed}",
        "seeds": [0, 1],
    }
    recipe = recipes.recipe(tmp_path, **changes)
    splits = fold_of(draw_splits(digits, recipe.dataset), [30, 45])
    images = len(splits.train)
    told = (
        f"stages.pretrain: each epoch leaves out {images % 32} of {images} images "
        "(fewer than a batch), others each time"
    )
    assert describe_left_out(recipe, "pretrain", splits) == [told]
    assert describe_left_out(recipe, "evaluate", splits) == []
    assert describe_left_out(recipe, "finetune", splits) == [
        "stages.finetune.labels_subset: 2 images of 'fold{seed}' are held out (dataset.val_fraction), or have no label",
        "stages.finetune: each epoch leaves out 5 to 10 of 30 to 45 images (fewer than a batch), others each time",
    ]


def test_passes_of_a_length_in_steps_are_noted(tmp_path: Path, digits: Store) -> None:
    steps = {"epochs": None, "steps": 1234}
    mixed = {"method": CLUSTERING, "labelled_per_batch": 12, "labels_per_class": 4}
    images = len(draw_splits(digits, recipes.recipe(tmp_path).dataset).train)
    for given, told in (
        ({}, f"{1234 / (images // 32):.1f} passes over {images} images"),
        (
            mixed,
            f"{1234 / ((images - 40) // 20):.1f} passes over {images - 40} images and 411.3 passes over 40 labelled "
            "images",
        ),
        ({**mixed, "labelled_per_batch": 32}, "1,234.0 passes over 40 images"),
    ):
        changes = {f"stages__pretrain__{key}": value for key, value in {**given, **steps}.items()}
        recipe = recipes.recipe(tmp_path, **changes)
        line = describe_left_out(recipe, "pretrain", draw_splits(digits, recipe.dataset))[-1]
        assert line == f"stages.pretrain.steps: 1,234 steps are {told}"


@pytest.mark.parametrize(
    ("labelled", "told"), [(8, " 2 of 98 images"), (20, " 2 of 98 images"), (32, " 8 of 40 images")]
)
def test_noted_tail_equals_that_of_the_plan(tmp_path: Path, digits: Store, labelled: int, told: str) -> None:
    changes = {
        "stages__pretrain__method": CLUSTERING,
        "stages__pretrain__labelled_per_batch": labelled,
        "stages__pretrain__labels_per_class": 4,
    }
    recipe = recipes.recipe(tmp_path, **changes, dataset__max_train=155)
    context = StageContext.create(recipe, digits, on_ray=False)
    stage: Any = recipe.stages["pretrain"]
    (line,) = describe_left_out(recipe, "pretrain", context.splits)
    tail = len(pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "f", tmp_path)).plan.tail(0))
    assert f"leaves out {tail} of " in line
    assert told in line


@pytest.mark.parametrize(
    ("key", "crop", "told"),
    [
        (
            "train",
            {"op": "random_crop", "size": 9},
            "dataset.train_augment: random_crop takes 9 pixels, and images have sides from 8 pixels on: "
            "a smaller image gives its largest square, scaled up",
        ),
        (
            "eval",
            {"op": "center_crop", "scale": 0.87499},
            "dataset.eval_augment: center_crop resamples 6.99992 pixels (0.87499 of 8) to 7; a size of 7 pixels "
            "copies them",
        ),
        ("eval", {"op": "center_crop", "scale": 0.875}, None),
        ("eval", {"op": "center_crop", "scale": 0.5}, None),
        ("eval", {"op": "center_crop", "size": 7}, None),
        ("train", {"op": "random_resized_crop"}, None),
    ],
)
def test_crops_that_resample_unasked_are_noted(
    tmp_path: Path, digits: Store, key: str, crop: dict[str, Any], told: str | None
) -> None:
    recipe = recipes.recipe(tmp_path, **{f"dataset__{key}_augment": [crop], "dataset__image_size": 7})
    assert describe_crops(recipe, digits) == ([] if told is None else [told])


def test_crop_of_a_stage_is_noted_by_its_key(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path, stages__finetune__augment=[{"op": "random_crop", "size": 9}])
    (line,) = describe_crops(recipe, digits)
    assert line.startswith("stages.finetune.augment: random_crop takes 9 pixels")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("test_size", 9, "stages.finetune.test_size: corner_crop takes 9 pixels"),
        ("test_scale", 0.99999, "stages.finetune.test_scale: corner_crop resamples 7.99992 pixels (0.99999 of 8) to 8"),
    ],
)
def test_scored_crops_are_noted_by_their_key(tmp_path: Path, digits: Store, key: str, value: float, told: str) -> None:
    recipe = recipes.recipe(tmp_path, **{f"stages__finetune__{key}": value})
    (line,) = describe_crops(recipe, digits)
    assert line.startswith(told)


def with_source(store: Store, **facts: object) -> Store:
    return replace(store, source={**store.source, **facts})


def test_notes_of_the_source_are_reported_with_its_place(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path, dataset__source="folder", dataset__root="/data")
    told = describe_problems(recipe, with_source(digits, notes=["a", "b"], identity="sample"))
    assert told[:2] == ["/data: a", "/data: b"]
    told = describe_problems(recipe, with_source(digits, aside="not read: x"))
    assert told[0] == "/data: not read: x"
    assert "was written by an earlier version, which compared names, sizes and times of files and no bytes" in told[1]
    assert not any("earlier version" in line for line in describe_problems(recipes.recipe(tmp_path), digits))


def test_images_that_are_not_kept_apart_are_reported(tmp_path: Path, digits: Store) -> None:
    fractions: dict[str, Any] = {"dataset__test_fraction": None, "dataset__val_fraction": None}
    alone = {"stages": {"pretrain": copy.deepcopy(recipes.RECIPE["stages"]["pretrain"])}, **fractions}
    drawn = with_source(digits, draws_test=True)
    assert describe_kept_apart(recipes.recipe(tmp_path, **fractions), drawn) == []
    assert describe_kept_apart(recipes.recipe(tmp_path, **alone), drawn) == [
        "no stage measures anything on test images or held-out images: such are trained on, too; "
        "dataset.test_fraction=0.2 and dataset.val_fraction=0.1 keeps them apart for later recipes"
    ]
    given = {**alone, "dataset__val_fraction": 0.1}
    assert "on test images: such are" in describe_kept_apart(recipes.recipe(tmp_path, **given), drawn)[0]
    assert describe_kept_apart(recipes.recipe(tmp_path, **given), digits) == []


def test_encoders_that_have_seen_the_test_images_are_reported(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, stages__embed={"kind": "embed"})
    (line,) = describe_seen_images(recipe, {"evaluate": "models:/x/1", "embed": "models:/x/1"})
    assert line.startswith(
        "stages.evaluate.encoder: models:/x/1 was trained on all images of this store, without labels"
    )

"""What a method needs of its batches, and whether it fits the encoder, is known before anything starts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.splits import Splits, split
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import data_checks, preflight
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.context import Worker
from tests.pipeline.data.prepare.test_prepare import images
from tests.pipeline.data.sources.published.test_voc import voc
from tests.pipeline.data.sources.published.test_voc_annotations import CAT, DOG, annotate
from tests.support import recipes

CLUSTERING = {"name": "clustering_locality"}
CONTRAST = {"name": "spatial_contrasting", "patch_size": 1}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"method": CLUSTERING},
        "stages.pretrain.labelled_per_batch: 0 is not valid: the method, as it is set, learns from labels; valid: 1 to 32",
    ),
    (
        {"method": CLUSTERING, "labelled_per_batch": 40},
        "labelled_per_batch: 40 is more than batch_size: 32; valid: 0 to 32",
    ),
    (
        {"method": CONTRAST, "labelled_per_batch": 4},
        "labelled_per_batch: 4 is not valid: the method, as it is set, looks at no label; valid: 0",
    ),
    ({"method": CONTRAST, "labels_per_class": 4}, "labels_per_class: 4 is not valid without labelled_per_batch"),
    (
        {"method": CONTRAST, "labels_subset": "fold0"},
        "stages.pretrain.labels_subset: 'fold0' is not valid without labelled_per_batch",
    ),
    (
        {"method": CONTRAST, "first_view": "plain"},
        "first_view: 'plain' is not valid: the method, as it is set, takes one view",
    ),
    ({"method": {**CONTRAST, "patch_size": 9}}, "stages.pretrain.method.patch_size: 9 is larger than map"),
    ({"method": {**CONTRAST, "layers": [5]}}, "stages.pretrain.method.layers: [5] must be among"),
    ({"method": {"name": "super_and", "rounds": 3}}, "stages.pretrain.method.rounds: 2 epochs are not 3 rounds"),
    (
        {"accumulate": 5},
        "batch_size: 32 is not valid: it is the sum over scale.workers = 1 workers and accumulate = 5 parts and must be a multiple of 5",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recipe = recipes.recipe(tmp_path, **{f"stages__pretrain__{key}": value for key, value in changes.items()})
    with pytest.raises(UserError) as caught:
        preflight.check(recipe)
    assert len(str(caught.value).splitlines()) == 1
    assert message in str(caught.value)


def test_an_auto_encoder_of_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^encoder\.input: is 'sobel'"):
        preflight.check(recipes.recipe(tmp_path, encoder__input="sobel", stages__pretrain__method={"name": "dae"}))


@pytest.mark.parametrize("labelled", [8, 32])
def test_what_fits_passes(tmp_path: Path, digits: Store, labelled: int) -> None:
    changes = {
        "stages__pretrain__method": CLUSTERING,
        "stages__pretrain__labelled_per_batch": labelled,
        "stages__pretrain__labels_per_class": 4,
    }
    recipe = recipes.recipe(tmp_path, **changes)
    preflight.check(recipe)
    data_checks.check_images(recipe, split(digits, recipe.dataset))


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
        data_checks.check_images(recipe, replace(split(digits, recipe.dataset), subset=no_folds))
    assert message in str(caught.value)


def no_folds(name: str) -> np.ndarray:
    raise UserError(f"{name!r} is unknown")


def fold_of(splits: Splits, sizes: list[int]) -> Splits:
    """fold0, fold1, ... of so many training and two held-out images."""
    return replace(splits, subset=lambda name: np.union1d(splits.train[: sizes[int(name[4:])]], splits.val[:2]))


@pytest.mark.fault(33, "fewer images than a batch, for one of the seeds")
def test_every_seed_is_checked_not_only_the_first(tmp_path: Path, digits: Store) -> None:
    changes = {
        "stages__finetune__labels_per_class": None,
        "stages__finetune__labels_subset": "fold{seed}",
        "seeds": [0, 1],
    }
    recipe = recipes.recipe(tmp_path, **changes)
    splits = split(digits, recipe.dataset)
    data_checks.check_images(recipe, fold_of(splits, [30, 20]))
    with pytest.raises(
        UserError, match=r"^stages\.finetune\.batch_size: 20 is more than the 19 images it would train on$"
    ):
        data_checks.check_images(recipe, fold_of(splits, [30, 19]))


@pytest.mark.fault(40, "what does not fill a batch is left out, and counted")
def test_what_is_left_out_is_told(tmp_path: Path, digits: Store) -> None:
    changes = {
        "stages__finetune__labels_per_class": None,
        "stages__finetune__labels_subset": "fold{seed}",
        "seeds": [0, 1],
    }
    recipe = recipes.recipe(tmp_path, **changes)
    splits = fold_of(split(digits, recipe.dataset), [30, 45])
    images = len(splits.train)
    told = f"stages.pretrain: each epoch leaves out {images % 32} of {images} images (fewer than a batch), others each time"
    assert data_checks.left_out(recipe, "pretrain", splits) == [told]
    assert data_checks.left_out(recipe, "evaluate", splits) == []
    assert data_checks.left_out(recipe, "finetune", splits) == [
        "stages.finetune.labels_subset: 2 images of 'fold{seed}' are held out (dataset.val_fraction), or have no label",
        "stages.finetune: each epoch leaves out 5 to 10 of 30 to 45 images (fewer than a batch), others each time",
    ]


@pytest.mark.parametrize(
    ("labelled", "told"), [(8, " 2 of 98 images"), (20, " 2 of 98 images"), (32, " 8 of 40 images")]
)
def test_the_tail_is_that_of_the_plan(tmp_path: Path, digits: Store, labelled: int, told: str) -> None:
    changes = {
        "stages__pretrain__method": CLUSTERING,
        "stages__pretrain__labelled_per_batch": labelled,
        "stages__pretrain__labels_per_class": 4,
    }
    recipe = recipes.recipe(tmp_path, **changes, dataset__max_train=155)
    worker = Worker.start(recipe, digits, on_ray=False)
    stage: Any = recipe.stages["pretrain"]
    (line,) = data_checks.left_out(recipe, "pretrain", worker.splits)
    tail = len(pretrain.job(worker, stage, Instance("pretrain", 0, "f", tmp_path)).plan.tail(0))
    assert f"leaves out {tail} of " in line
    assert told in line


@pytest.mark.parametrize("stage", ["evaluate", "finetune"])
def test_stages_that_need_one_label_refuse_annotations(tmp_path: Path, stage: str) -> None:
    root = voc(tmp_path / "in", train="000000\n000001\n", test="000002\n")
    for image in range(3):
        annotate(root, image, CAT, DOG)
    recipe = recipes.recipe(
        tmp_path, dataset__name="cells", dataset__source="voc", dataset__root=str(root), dataset__max_train=None
    )
    stages = {name: kind for name, kind in recipe.stages.items() if name in ("pretrain", stage)}
    with pytest.raises(
        UserError,
        match=rf"^stages\.{stage}.* needs labels, one for an image, and dataset\.root .* has boxes, present instead; valid: ",
    ):
        preflight.check(recipe.model_copy(update={"stages": stages}))
    preflight.check(recipe.model_copy(update={"stages": {"pretrain": recipe.stages["pretrain"]}}))


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
        preflight.check(recipe.model_copy(update={"stages": stages}))
    preflight.check(recipe.model_copy(update={"stages": {"pretrain": recipe.stages["pretrain"]}}))

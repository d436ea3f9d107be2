"""A pretraining that cannot be is refused in one line, before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.preflight import check_without_images
from firstlight.pipeline.stages.pretraining.checks import (
    check_pretrain_images,
    check_pretrain_steps,
    count_pretrain_images,
)
from tests.support import recipes

# Training images that the recipe of the tests leaves.
IMAGES = 110
LEARNS_LABELS = {"name": "clustering_locality"}


def count_images(folder: Path, store: Store, **keys: Any) -> int:
    recipe = recipes.recipe(folder, **{f"stages__pretrain__{key}": value for key, value in keys.items()})
    stage: Any = recipe.stages["pretrain"]
    splits = draw_splits(store, recipe.dataset, recipe.measured_splits)
    check_pretrain_steps("stages.pretrain", stage, splits, 0)
    return count_pretrain_images("stages.pretrain", stage, splits, 0)


def test_images_are_all_that_a_training_sees(tmp_path: Path, digits: Store) -> None:
    mixed = {"method": LEARNS_LABELS, "labelled_per_batch": 8, "labels_per_class": 2}
    assert count_images(tmp_path, digits) == IMAGES
    assert count_images(tmp_path, digits, **mixed) == IMAGES
    assert count_images(tmp_path, digits, **mixed, max_unlabelled=30) == 20 + 30
    assert count_images(tmp_path, digits, **{**mixed, "labelled_per_batch": 20, "batch_size": 20}) == 20


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_unlabelled": 91}, "stages.pretrain.max_unlabelled: 91 is more than the 90 training images beside"),
        ({"labelled_per_batch": 24}, "stages.pretrain.labelled_per_batch: 24 is more than the 20 labelled images"),
        (
            {"labelled_per_batch": 4, "batch_size": 96},
            "stages.pretrain.labelled_per_batch: 4 leaves 92 images of a batch to the 90 without a label",
        ),
    ],
)
def test_mixture_that_no_batch_can_have_is_a_one_line_error(
    tmp_path: Path, digits: Store, keys: dict[str, Any], message: str
) -> None:
    mixed = {"method": LEARNS_LABELS, "labelled_per_batch": 8, "labels_per_class": 2}
    with pytest.raises(UserError) as caught:
        count_images(tmp_path, digits, **{**mixed, **keys})
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_length_in_steps_that_the_method_refuses_is_a_one_line_error(tmp_path: Path, digits: Store) -> None:
    rounds = {"name": "super_and", "dim": 8, "rounds": 2}
    assert count_images(tmp_path, digits, method=rounds, epochs=None, steps=6) == IMAGES
    with pytest.raises(
        UserError, match=r"^stages\.pretrain\.method\.rounds: .*; stages\.pretrain\.steps: 5, 3 in an e"
    ):
        count_images(tmp_path, digits, method=rounds, epochs=None, steps=5)


@pytest.mark.parametrize(("negatives", "images"), [(109, IMAGES), (65_536, 65_537), (None, 3)])
def test_number_of_images_that_the_method_takes_passes(tmp_path: Path, negatives: int | None, images: int) -> None:
    """Before the images are known nothing is assumed of their number."""
    method = {"name": "super_and", "dim": 8, "rounds": 2, "negatives": negatives}
    recipe = recipes.recipe(tmp_path, stages__pretrain__method=method)
    check_without_images(recipe)
    stage: Any = recipe.stages["pretrain"]
    check_pretrain_images("stages.pretrain", stage, images)
    if negatives is not None:
        with pytest.raises(UserError, match=f"negatives: {negatives} rows are not fewer than the {images - 1} images"):
            check_pretrain_images("stages.pretrain", stage, images - 1)


def test_number_of_images_that_the_method_refuses_is_a_one_line_error(tmp_path: Path) -> None:
    method = {"name": "super_and", "dim": 8, "rounds": 2, "negatives": IMAGES}
    stage: Any = recipes.recipe(tmp_path, stages__pretrain__method=method).stages["pretrain"]
    wanted = f"^stages.pretrain.method.negatives: {IMAGES} rows are not fewer than the {IMAGES} images trained on; .*$"
    with pytest.raises(UserError, match=wanted):
        check_pretrain_images("stages.pretrain", stage, IMAGES)

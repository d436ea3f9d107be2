"""The crops of the shipped recipes: one that a paper gives in pixels copies pixels, on every path."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import Augment
from firstlight.pipeline.config.scoring_views import ScoringViews
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment.op_params import CropBox
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.train.device_ops.augment_batch import augment_batch
from tests.support.noise_images import make_noise, to_batch_of_images
from tests.support.paths import WITHOUT_ROOT

# The side of the images of a data set, or the side that its papers scale the shorter side of an image to.
SIDES = {
    **dict.fromkeys(("cifar10", "cifar10_binary", "cifar100", "svhn"), 32),
    **{"stl10": 96, "mnist": 28, "mnist_5k": 28, "digits": 8},
    **dict.fromkeys(("imagenet", "imagenet_devkit", "voc2007", "voc2012", "stanford_dogs", "cub200", "list"), 256),
}
SQUARES = {"center_crop", "random_crop", "corner_crop", "window_crop"}
NAMES = [recipe.name for recipe in list_recipes()]
STL10 = ["dae/stl10", "dae/table5", "dae/figure7"]
IMAGES = 600


def opened(name: str) -> Recipe:
    return load_recipe(RECIPES_FOLDER / f"{name}.yaml", () if name in WITHOUT_ROOT else ("dataset.root=/data",))


def list_augments(recipe: Recipe) -> Iterator[Augment]:
    yield recipe.dataset.train_augment
    yield recipe.dataset.eval_augment
    for stage in recipe.stages.values():
        if isinstance(stage, TrainingOptions) and stage.augment:
            yield stage.augment
        if isinstance(stage, ScoringViews) and (stage.test_crops, stage.test_crop) == (10, "corners"):
            yield from stage.build_corner_crops()
        if isinstance(stage, ScoringViews) and stage.scored_pixels == "image":
            yield from stage.build_covering_windows(np.array([[256, 256]]))


def draw(ops: Augment, side: int, size: int) -> list[augment.OpBatch]:
    ids = np.arange(IMAGES)
    keys = derive_view_keys(0, ids * 0, ids, 0)
    return augment.sample_params([op.model_dump() for op in ops], keys, np.full((IMAGES, 2), side), size)


def is_copied(box: CropBox, size: int) -> bool:
    return box.width == box.height == size and box.left == int(box.left) and box.top == int(box.top)


@pytest.mark.parametrize("name", NAMES)
def test_crop_that_is_a_pixel_from_the_size_of_the_view_is_of_that_size(name: str) -> None:
    """A rounded share of the image, 0.927083 of 96 for 89 pixels, resamples every pixel for a 300,000th of the side."""
    recipe = opened(name)
    side, size = SIDES.get(recipe.dataset.name), recipe.dataset.image_size
    if name == "dae/imagenet_32":
        side = 32  # images are read at this scale
    crops = [ops for ops in list_augments(recipe) if ops[0].op in SQUARES]
    assert recipe.dataset.name in SIDES or recipe.dataset.name in {"folder", "bccd", "camvid", "webdataset"}
    for ops in crops if side else ():
        boxes: list[Any] = draw(ops, side, size)[0].params_per_image()  # type: ignore[arg-type]
        near = [box for box in boxes if abs(box.width - size) < 1]
        assert all(is_copied(box, size) for box in near), (name, ops[0])


@pytest.mark.parametrize("name", STL10)
def test_crops_of_stl10_copy_pixels_on_the_cpu_and_on_a_device(name: str) -> None:
    recipe = opened(name)
    source = make_noise(IMAGES, 96, 96)
    assert recipe.dataset.image_size == 89
    places = set()
    for ops in (recipe.dataset.train_augment[:1], recipe.dataset.eval_augment):
        drawn = draw(ops, 96, 89)
        boxes: list[Any] = drawn[0].params_per_image()
        wanted = np.stack(
            [
                pixels[int(box.top) : int(box.top) + 89, int(box.left) : int(box.left) + 89]
                for pixels, box in zip(source, boxes, strict=True)
            ]
        )
        by_pillow = np.stack(list(augment.apply_batch([Image.fromarray(pixels) for pixels in source], drawn, 89)))
        assert np.array_equal(by_pillow, wanted)
        assert torch.equal(augment_batch(to_batch_of_images(source), drawn, 89), to_batch_of_images(wanted))
        places |= {(box.left, box.top) for box in boxes}
    assert len(places) == 64, "all places of 89 of 96 pixels"

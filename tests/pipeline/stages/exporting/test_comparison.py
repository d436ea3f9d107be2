"""Networks are compared on images that they were not trained on, and on noise, by their largest difference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.exporting.comparison import choose_comparison_images, compare_answers
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.training_job import to_batch
from tests.support import recipes


def test_difference_is_the_largest_of_all_outputs() -> None:
    def own(images: Tensor) -> tuple[Tensor, ...]:
        return images, 4 * images

    def other(images: Tensor) -> tuple[Tensor, ...]:
        return images - 0.5, 4 * images + 1

    tests = {"ones": torch.ones(3, 3, 2, 2), "twos": torch.full((1, 3, 2, 2), 2.0)}
    assert compare_answers(own, other, tests) == {
        "ones": {"images": 3, "absolute": 1.0, "relative": 0.5},
        "twos": {"images": 1, "absolute": 1.0, "relative": 0.25},
    }


@pytest.mark.parametrize(("part", "empty"), [("val", ()), ("test", ("val",)), ("train", ("val", "test"))])
def test_images_are_held_out_where_there_are_any_and_random(
    tmp_path: Path, digits: Store, part: str, empty: tuple[str, ...]
) -> None:
    context = StageContext.create(recipes.recipe(tmp_path), digits, on_ray=False)
    none: Any = dict.fromkeys(empty, context.splits.train[:0])
    context = replace(context, splits=replace(context.splits, **none))
    images = choose_comparison_images(context)
    ids = getattr(context.splits, part)[:8]
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0)
    assert torch.equal(images["store"], to_batch(loader.load_once(ids), torch.device("cpu")).views[0])
    assert {name: tuple(found.shape) for name, found in images.items()} == {
        "store": (8, 3, 8, 8),
        "random 1": (1, 3, 8, 8),
        "random 5": (5, 3, 8, 8),
    }
    assert all(0 <= float(found.min()) <= float(found.max()) <= 1 for found in images.values())
    assert all(torch.equal(found, images[name]) for name, found in choose_comparison_images(context).items())

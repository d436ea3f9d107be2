"""Notes about images that a stage leaves out."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.data_notes import describe_left_out
from firstlight.pipeline.stages import pretrain
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
    worker = StageContext.create(recipe, digits, on_ray=False)
    stage: Any = recipe.stages["pretrain"]
    (line,) = describe_left_out(recipe, "pretrain", worker.splits)
    tail = len(pretrain.build_job(worker, stage, StageInstance("pretrain", 0, "f", tmp_path)).plan.tail(0))
    assert f"leaves out {tail} of " in line
    assert told in line

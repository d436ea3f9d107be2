"""Batches that a method cannot use, and encoders that do not fit it, are refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import preflight
from tests.support import recipes
from tests.support.voc_folders import CAT, DOG, write_objects, write_voc

CLUSTERING = {"name": "clustering_locality"}
CONTRAST = {"name": "spatial_contrasting", "patch_size": 1}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"method": CLUSTERING},
        "stages.pretrain.labelled_per_batch: 0 is not valid: "
        "the method, as it is set, learns from labels; valid: 1 to 32",
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
        "batch_size: 32 is not valid: it is the sum over scale.workers = 1 workers and accumulate = 5 parts "
        "and must be a multiple of 5",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_mistake_is_a_one_line_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recipe = recipes.recipe(tmp_path, **{f"stages__pretrain__{key}": value for key, value in changes.items()})
    with pytest.raises(UserError) as caught:
        preflight.check_recipe(recipe)
    assert len(str(caught.value).splitlines()) == 1
    assert message in str(caught.value)


def test_an_auto_encoder_of_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^encoder\.input: 'sobel' is not .*reconstruct"):
        preflight.check_recipe(
            recipes.recipe(tmp_path, encoder__input="sobel", stages__pretrain__method={"name": "dae"})
        )


@pytest.mark.parametrize("stage", ["evaluate", "finetune"])
def test_stages_that_need_one_label_refuse_annotations(tmp_path: Path, stage: str) -> None:
    root = write_voc(tmp_path / "in", train="000000\n000001\n", test="000002\n")
    for image in range(3):
        write_objects(root, image, CAT, DOG)
    recipe = recipes.recipe(
        tmp_path, dataset__name="cells", dataset__source="voc", dataset__root=str(root), dataset__max_train=None
    )
    stages = {name: kind for name, kind in recipe.stages.items() if name in ("pretrain", stage)}
    with pytest.raises(
        UserError,
        match=rf"^stages\.{stage}.* needs labels, one for an image, "
        r"and dataset\.root .* has boxes, present instead; valid: ",
    ):
        preflight.check_recipe(recipe.model_copy(update={"stages": stages}))
    preflight.check_recipe(recipe.model_copy(update={"stages": {"pretrain": recipe.stages["pretrain"]}}))

"""The dataset groups of the published sets, and of a hub, resolve, each to its source."""

import pytest

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.data.sources import SOURCES
from firstlight.pipeline.errors import UserError
from tests.support.paths import ROOT

SETS = {
    "cifar10_binary": "cifar10",
    "cifar100": "cifar100",
    "stl10": "stl10",
    "svhn": "svhn",
    "imagenet_devkit": "imagenet",
    "voc2007": "voc",
    "voc2012": "voc",
    "bccd": "voc",
    "camvid": "voc",
    "mnist": "idx",
    "stanford_dogs": "stanford_dogs",
    "cub200": "cub200",
    "hugging_face": "hugging_face",
}


@pytest.mark.parametrize("name", sorted(SETS))
def test_shipped_dataset_group_loads(name: str) -> None:
    found: DatasetOptions = load_recipe(
        ROOT / "conf/recipe/folder_nat.yaml", (f"dataset.name={name}", "dataset.root=/data")
    ).dataset
    assert (found.name, found.source) == (name, SETS[name])
    assert found.source in SOURCES


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("dataset.annotations=[mask,boxes]", "mask only alone"),
        ("dataset.annotations=[boxes,boxes]", "each may occur once"),
        ("dataset.annotations=[box]", "dataset.annotations"),
        ("dataset.name=folder", "takes no dataset.annotations"),
    ],
)
def test_impossible_annotations_are_refused(override: str, why: str) -> None:
    changes = ("dataset.name=voc2007", "dataset.root=/data", "dataset.annotations=[boxes]", override)
    with pytest.raises(UserError) as error:
        load_recipe(ROOT / "conf/recipe/folder_nat.yaml", changes)
    assert why in str(error.value)

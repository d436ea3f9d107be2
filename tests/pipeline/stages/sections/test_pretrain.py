"""The facts that follow from the section of a pretraining alone."""

from pathlib import Path
from typing import Any

from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.train.selection import SelectionOptions
from tests.support import recipes


def read_section(folder: Path, **keys: Any) -> Pretrain:
    stage = recipes.recipe(folder, **{f"stages__pretrain__{k}": v for k, v in keys.items()}).stages["pretrain"]
    assert isinstance(stage, Pretrain)
    return stage


def test_augmentations_are_listed_by_their_key(tmp_path: Path) -> None:
    crop = [{"op": "center_crop"}]
    assert read_section(tmp_path).list_augments() == {}
    groups = [{}, {"augment": [{"op": "random_crop"}]}]
    found = read_section(tmp_path, augment=crop, views=groups).list_augments()
    assert {key: [op.op for op in ops] for key, ops in found.items()} == {
        "augment": ["center_crop"],
        "views.1.augment": ["random_crop"],
    }


def test_measuring_changes_results_only_where_it_selects_weights(tmp_path: Path) -> None:
    watch = {"every": 1}
    assert "watch" in read_section(tmp_path, watch=watch).keys_without_effect
    selecting = read_section(tmp_path, watch=watch, keep="best", early_stopping=3)
    assert "watch" not in selecting.keys_without_effect
    assert selecting.selection == SelectionOptions("watch_knn", True, 3)


def test_splits_are_those_that_something_measures(tmp_path: Path) -> None:
    assert read_section(tmp_path).measured_splits == frozenset()
    assert read_section(tmp_path, watch={"every": 1}).measured_splits == {"val"}
    assert read_section(tmp_path, pictures="test").measured_splits == {"test"}

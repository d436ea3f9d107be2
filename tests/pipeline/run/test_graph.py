"""Folders are named by all that decides a result, and stages find the encoder that they start from."""

import copy
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.graph import ResolvedReferences, StageGraph
from firstlight.pipeline.stages.stage import TrainingSegment
from tests.support import recipes


def graph_of(recipe: Recipe, segment: TrainingSegment | None = None) -> StageGraph:
    return StageGraph(recipe, recipe.storage / recipe.name, "store", ResolvedReferences(), segment)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"scale__workers": 1}, True),
        ({"stages__pretrain__log_every": 7}, True),
        ({"stages__pretrain__register_as": "digits"}, True),
        ({"stages__pretrain__batch_size": 16}, False),
        ({"stages__pretrain__method__dim": 4}, False),
        ({"encoder__width": 8}, False),
        ({"stages__evaluate__knn_k": 3}, True),
    ],
)
def test_folder_changes_with_what_decides_the_result_only(tmp_path: Path, changes: dict[str, Any], same: bool) -> None:
    before = graph_of(recipes.recipe(tmp_path)).find_instance("pretrain", 0)
    after = graph_of(recipes.recipe(tmp_path, **changes)).find_instance("pretrain", 0)
    assert (before.folder == after.folder) == same


def test_seeds_and_stores_have_folders_of_their_own(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path)
    graph = graph_of(recipe)
    other = StageGraph(recipe, graph.folder, "another store", ResolvedReferences())
    found = {graph.find_instance("pretrain", 0).folder, graph.find_instance("pretrain", 1).folder}
    assert len(found | {other.find_instance("pretrain", 0).folder}) == 3


def test_a_stage_after_an_unfinished_one_names_its_key_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stages\.evaluate\.encoder: 'previous' is .*seed 0.*firstlight pretrain"):
        graph_of(recipes.recipe(tmp_path)).find_instance("evaluate", 0)


def test_only_instances_with_a_folder_have_begun(tmp_path: Path) -> None:
    graph = graph_of(recipes.recipe(tmp_path, seeds=[0, 1]))
    assert graph.find_begun("pretrain") == []
    begun = graph.find_instance("pretrain", 1)
    begun.folder.mkdir(parents=True)
    assert graph.find_begun("pretrain") == [begun]
    assert graph.find_begun("evaluate") == [], "it cannot begin before its encoder is trained"


def test_segment_of_a_training_is_of_its_stage_only(tmp_path: Path) -> None:
    segment = TrainingSegment("pretrain", until=5)
    graph = graph_of(recipes.recipe(tmp_path), segment)
    assert graph.find_instance("pretrain", 0).until == 5
    assert (
        graph_of(recipes.recipe(tmp_path), TrainingSegment("finetune", until=5)).find_instance("pretrain", 0).until
        is None
    )


def test_folder_depends_on_the_measured_splits_if_a_fraction_is_null(tmp_path: Path) -> None:
    kept = {"pretrain": copy.deepcopy(recipes.RECIPE["stages"]["pretrain"])}
    for given, same in (
        ({}, True),
        ({"dataset__val_fraction": None}, False),
        ({"dataset__test_fraction": None}, False),
    ):
        whole = graph_of(recipes.recipe(tmp_path, **given)).find_instance("pretrain", 0)
        alone = graph_of(recipes.recipe(tmp_path, stages=kept, **given)).find_instance("pretrain", 0)
        assert (whole.folder == alone.folder) == same

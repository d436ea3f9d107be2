"""What trials are judged by: read from what the stages of a real chain leave behind."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe, parse
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.run.runner import Place, run_in
from firstlight.pipeline.search.objectives import Objective, by_seed, is_logged, measures
from firstlight.pipeline.stages.stage import Instance
from tests.support import recipes

Ran = tuple[Recipe, list[Instance]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The small chain with two seeds and a watch, the test split left alone."""
    folder = tmp_path_factory.mktemp("objectives")
    raw = recipes.recipe(
        folder, seeds=[0, 1], stages__pretrain__watch__every=1, stages__evaluate__layers=[0, -1], score_test=False
    ).dump()
    raw["stages"]["retrieve"] = {"kind": "retrieve", "queries": "val", "precision_at": [1, 3]}
    recipe = parse(raw)
    _, instances = run_in(Place(folder / "here", {"firstlight.kind": "trial"}), recipe, Console(file=io.StringIO()))
    return recipe, instances


@pytest.mark.parametrize(
    "measure",
    [
        "evaluate.knn_layer0", "evaluate.probe_layer-1", "evaluate.rankme_layer-1", "finetune", "finetune.scratch", "retrieve.precision@3",
        "retrieve.mean_average_precision", "pretrain.loss", "pretrain.moved", "pretrain.watch_knn", "pretrain.watch_rankme",
    ],
)  # fmt: skip
def test_a_value_of_each_seed(ran: Ran, measure: str) -> None:
    values = by_seed(measure, *ran)
    assert len(values) == 2
    assert all(value > -1 for value in values)
    assert values[0] != values[1] or measure not in ("pretrain.loss", "pretrain.watch_rankme")


def test_no_result_has_a_number_of_the_test_split(ran: Ran) -> None:
    def keys(value: Any) -> set[str]:
        if not isinstance(value, dict):
            return set()
        return set(value) | {below for item in value.values() for below in keys(item)}

    for instance in ran[1]:
        assert instance.result is not None
        assert "test" not in keys(instance.result), instance.label


def test_the_scores_are_those_of_held_out_images(ran: Ran) -> None:
    recipe, instances = ran
    (first, _) = (i for i in instances if i.stage == "finetune")
    assert first.result is not None
    assert by_seed("finetune", recipe, instances)[0] == first.result["pretrained"]["val"] == max(
        score for name, score in first.result["tried"].items() if name.startswith("pretrained")
    )  # fmt: skip


def test_a_number_that_is_not_logged_is_named(ran: Ran) -> None:
    with pytest.raises(StopTraining, match=r"pretrain\.psnr: is not logged; valid: .*moved"):
        by_seed("pretrain.psnr", *ran)


def test_what_is_known_on_the_way(ran: Ran) -> None:
    recipe, _ = ran
    assert is_logged("pretrain.watch_knn", recipe)
    assert not is_logged("evaluate.knn_layer0", recipe)
    assert "watch_rankme" in measures(recipe.stages["pretrain"])


def test_the_accuracy_of_a_classifier_of_its_own_is_known_at_the_end(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path).dump()
    raw["stages"]["pretrain"] |= {"method": {"name": "clustering_locality", "gamma": 0.0}, "labelled_per_batch": 16}
    recipe = parse(raw)
    assert not is_logged("pretrain.accuracy", recipe)
    assert "accuracy" in measures(recipe.stages["pretrain"])


def test_the_sign() -> None:
    assert [Objective(measure="a.b", mode=mode).sign for mode in ("max", "min")] == [1, -1]  # type: ignore[arg-type]

"""Scores of trials, read from the results of a real chain of stages."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import StopTraining, UserError
from firstlight.pipeline.run.publishing import ParentRun
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search.objectives import Objective, check_measure, is_logged, parse_measure, read_scores
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from tests.support import recipes

pytestmark = pytest.mark.usefixtures("undrawn_figures")

Ran = tuple[Recipe, list[StageInstance]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The small chain with two seeds and monitored features, without the test split."""
    folder = tmp_path_factory.mktemp("objectives")
    raw = recipes.recipe(
        folder, seeds=[0, 1], stages__pretrain__watch__every=1, stages__evaluate__layers=[0, -1], score_test=False
    ).dump()
    raw["stages"]["evaluate"]["probe_weight_decays"] = [0.001]
    raw["stages"]["retrieve"] = {"kind": "retrieve", "queries": "val", "precision_at": [1, 3]}
    recipe = parse_recipe(raw)
    parent = ParentRun(folder / "here", {"firstlight.kind": "trial"})
    instances = run_recipe(recipe, Console(file=io.StringIO()), parent=parent).instances
    return recipe, instances


@pytest.mark.parametrize(
    "measure",
    [
        *("evaluate.knn_layer0", "evaluate.probe_layer-1", "evaluate.rankme_layer-1"),
        *("finetune", "finetune.scratch", "retrieve.precision@3", "retrieve.mean_average_precision"),
        *("pretrain.loss", "pretrain.moved", "pretrain.watch_knn", "pretrain.watch_rankme"),
    ],
)
def test_measure_has_a_score_of_each_seed(ran: Ran, measure: str) -> None:
    values = read_scores(measure, *ran)
    assert len(values) == 2
    assert all(value > -1 for value in values)
    assert values[0] != values[1] or measure not in ("pretrain.loss", "pretrain.watch_rankme")


def test_no_result_contains_the_test_split(ran: Ran) -> None:
    def keys(value: Any) -> set[str]:
        if not isinstance(value, dict):
            return set()
        return set(value) | {below for item in value.values() for below in keys(item)}

    for instance in ran[1]:
        assert instance.result is not None
        assert "test" not in keys(instance.result), instance.label


def test_score_is_the_best_on_held_out_images(ran: Ran) -> None:
    recipe, instances = ran
    (first, _) = (i for i in instances if i.stage == "finetune")
    assert first.result is not None
    assert read_scores("finetune", recipe, instances)[0] == first.result["pretrained"]["val"] == max(
        score for name, score in first.result["tried"].items() if name.startswith("pretrained")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "stage", "number"),
    [("evaluate.knn_layer-1", "evaluate", "knn_layer-1"), ("finetune", "finetune", ""), ("", "", "")],
)
def test_measure_has_a_stage_and_a_number(text: str, stage: str, number: str) -> None:
    assert parse_measure(text) == (stage, number)


def test_stage_without_measures_is_refused_with_those_that_have_some(tmp_path: Path) -> None:
    embed, reconstruct = {"kind": "embed"}, {"kind": "reconstruct", "corruption": "pixel_gaussian"}
    recipe = recipes.recipe(tmp_path, stages__vectors=embed, stages__pictures=reconstruct)
    names = r"pretrain, evaluate, finetune, pictures\Z"
    with pytest.raises(UserError, match=rf"^measure: 'vectors': a stage of kind embed measures .* a number of {names}"):
        check_measure("vectors", "measure", recipe)


def test_measure_that_is_not_logged_names_logged_ones(ran: Ran) -> None:
    with pytest.raises(StopTraining, match=r"pretrain\.psnr: is not logged; valid: .*moved"):
        read_scores("pretrain.psnr", *ran)


def test_only_pretraining_measures_are_logged(ran: Ran) -> None:
    recipe, _ = ran
    assert is_logged("pretrain.watch_knn", recipe)
    assert not is_logged("evaluate.knn_layer0", recipe)
    assert "watch_rankme" in stage_kind(recipe.stages["pretrain"]).objectives(recipe.stages["pretrain"])


def test_all_monitored_numbers_are_measures(ran: Ran) -> None:
    recipe, instances = ran
    rows = read_metrics(next(i.folder for i in instances if i.stage == "pretrain") / METRICS_FILE)
    logged = {key for row in rows for key in row if key.startswith("watch_")}
    assert logged == {
        name
        for name in stage_kind(recipe.stages["pretrain"]).objectives(recipe.stages["pretrain"])
        if name.startswith("watch_")
    }


def test_accuracy_of_a_classifier_is_known_at_the_end_only(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path).dump()
    raw["stages"]["pretrain"] |= {"method": {"name": "clustering_locality", "gamma": 0.0}, "labelled_per_batch": 16}
    recipe = parse_recipe(raw)
    assert not is_logged("pretrain.accuracy", recipe)
    assert "accuracy" in stage_kind(recipe.stages["pretrain"]).objectives(recipe.stages["pretrain"])


def test_sign_makes_larger_values_better() -> None:
    assert [Objective(measure="a.b", mode=mode).sign for mode in ("max", "min")] == [1, -1]  # type: ignore[arg-type]

"""The Python API: a recipe is run, and what it leaves is opened."""

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from firstlight.pipeline import api
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from tests.support import recipes, searches

STAGES = {
    "stages__embed": {"kind": "embed"},
    "stages__retrieve": {"kind": "retrieve", "gallery": "all", "queries": "test"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = recipes.recipe(tmp_path_factory.mktemp("api"), seeds=[0, 1], **STAGES)
    del recipe.stages["finetune"]
    return recipe


@pytest.fixture(scope="module")
def result(recipe: Recipe, undrawn_figures: None) -> api.RunResult:
    return api.run(recipe)


@pytest.fixture(scope="module")
def encoder(recipe: Recipe, result: api.RunResult) -> api.ImageEncoder:
    return api.load_encoder(result.encoders[0], storage=recipe.storage)


@pytest.fixture(scope="module")
def opened(recipe: Recipe, result: api.RunResult) -> list[Image.Image]:
    """All images of the store, in the order of their ids."""
    (folder,) = (recipe.storage / "stores").glob("*/")
    store = api.open_store(folder)
    encoded, _ = store.read(np.concatenate([store.ids("train"), store.ids("test")]))
    return [Image.open(io.BytesIO(data)) for data in encoded]


def folder_of(recipe: Recipe, stage: str) -> Path:
    (folder,) = (recipe.storage / recipe.name).glob(f"{stage}-seed0-*/")
    return folder


def test_run_returns_the_table_and_an_encoder_for_each_seed(recipe: Recipe, result: api.RunResult) -> None:
    assert result.table == tuple(run_recipe(recipe, Console(quiet=True)).rows)
    assert result.report == recipe.storage / recipe.name / "report.html"
    assert result.report.is_file()
    assert list(result.encoders) == [0, 1]
    assert result.stage_encoders == {"pretrain": result.encoders}


def test_run_of_stages_that_make_no_encoder_returns_none(recipe: Recipe, result: api.RunResult) -> None:
    again = api.run(recipe, only="evaluate")
    assert again.run_id == result.run_id
    assert again.encoders == {}


def test_run_prints_progress_to_stderr_unless_it_is_quiet(
    recipe: Recipe, result: api.RunResult, capfd: pytest.CaptureFixture[str]
) -> None:
    api.run(recipe, quiet=True)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    api.run(recipe)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "pretrain seed 1: finished before" in captured.err


def test_result_shows_itself_in_a_notebook(recipe: Recipe, result: api.RunResult) -> None:
    shown = result._repr_html_()
    assert shown is not None
    assert result.report.as_uri() in shown
    assert shown.count("<tr>") == 1 + len(result.table)
    assert "recipe=" not in repr(result)
    assert dataclasses.replace(result, recipe=None)._repr_html_() is None


def test_run_prints_progress_to_the_console(recipe: Recipe, result: api.RunResult) -> None:
    text = io.StringIO()
    api.run(recipe, console=Console(file=text))
    assert "pretrain seed 1: finished before" in text.getvalue()


def test_list_runs_has_the_recipe_and_its_stages(recipe: Recipe, result: api.RunResult) -> None:
    runs = api.list_runs(storage=recipe.storage)
    assert [run.start for run in runs] == sorted((run.start for run in runs), reverse=True)
    assert next(run.name for run in runs if run.id == result.run_id) == recipe.name
    kinds = {run.kind for run in runs}
    assert kinds == {"recipe", "prepare", "pretrain", "evaluate", "embed", "retrieve"}


def test_list_runs_of_an_empty_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri"):
        api.list_runs(storage=tmp_path)


def test_encoder_is_the_same_by_reference_and_by_folder(
    recipe: Recipe, result: api.RunResult, encoder: api.ImageEncoder
) -> None:
    folder = folder_of(recipe, "pretrain") / "encoder"
    images = torch.rand(3, 3, 8, 8)
    expected = load_encoder(folder, 8).eval()(images)
    for loaded in (encoder, api.load_encoder(folder)):
        assert not loaded.training
        assert loaded.image_size == 8
        for found, map_ in zip(loaded(images), expected, strict=True):
            assert torch.equal(found, map_)


def test_encoder_takes_another_image_size(recipe: Recipe, result: api.RunResult) -> None:
    usual = api.load_encoder(result.encoders[1], storage=recipe.storage)
    larger = api.load_encoder(result.encoders[1], 16, storage=recipe.storage)
    assert larger.shapes[-1][1:] == tuple(2 * side for side in usual.shapes[-1][1:])
    with pytest.raises(UserError, match="image_size: 1 "):
        api.load_encoder(result.encoders[1], 1, storage=recipe.storage)


@pytest.mark.parametrize("reference", ["runs:/0123abcd/encoder", "models:/nothing@best"])
def test_missing_reference_is_named(recipe: Recipe, result: api.RunResult, reference: str) -> None:
    with pytest.raises(UserError, match=reference):
        api.load_encoder(reference, storage=recipe.storage)


def test_reference_in_an_unused_storage_creates_no_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was run"):
        api.load_encoder("runs:/0123abcd/encoder", storage=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        api.load_encoder(tmp_path / "absent")


def test_embed_equals_the_embed_stage(recipe: Recipe, encoder: api.ImageEncoder, opened: list[Image.Image]) -> None:
    ids, vectors = api.open_embeddings(folder_of(recipe, "embed"))
    embedded = encoder.embed([opened[i] for i in ids], batch_size=50)
    np.testing.assert_allclose(embedded, vectors, rtol=1e-5, atol=1e-6)
    test_ids, _ = api.open_embeddings(folder_of(recipe, "embed") / "embeddings", "test")
    assert len(test_ids) == 60


def test_index_finds_the_images_that_were_embedded(
    recipe: Recipe, encoder: api.ImageEncoder, opened: list[Image.Image]
) -> None:
    index = api.open_index(folder_of(recipe, "retrieve"))
    queries = index.ids[:5]
    ids, cosines = index.search(encoder.embed([opened[i] for i in queries]), k=3)
    assert ids.shape == cosines.shape == (5, 3)
    np.testing.assert_allclose(cosines[:, 0], 1.0, atol=1e-5)
    np.testing.assert_array_equal(ids[:, 0], queries)


def test_load_recipe_takes_overrides_and_names_wrong_keys(tmp_path: Path) -> None:
    searches.write_files(tmp_path)
    recipe = api.load_recipe(tmp_path / "recipe.yaml", "stages.pretrain.epochs=7")
    assert recipe.stages["pretrain"].epochs == 7  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"scale\.workrs.*workers"):
        api.load_recipe(str(tmp_path / "recipe.yaml"), "scale.workrs=2")


def test_search_takes_keys_of_the_search_and_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[SearchPlan] = []
    found = SimpleNamespace(trials=[], best=None, promoted=None)
    monkeypatch.setattr(api, "run_search", lambda plan, console: plans.append(plan) or found)
    monkeypatch.setattr(api, "summarise_search", lambda search, *rest: f"the table of {search.num_trials} trials")
    assert api.search(searches.write_files(tmp_path), "stages.pretrain.epochs=3", trials=2) is found
    assert "the table of 2 trials" in capsys.readouterr().err
    (plan,) = plans
    assert plan.search.num_trials == 2
    assert plan.budget_recipe().stages["pretrain"].epochs == 3  # type: ignore[attr-defined]

"""Weights that a recipe names: loaded, continued by a pretraining, handed to stages, and known by their content."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import EncoderSource, Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import RecipeRun, run_recipe
from firstlight.pipeline.stages.artifacts.encoder_description import read_encoder_description
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.tracking.client import WEIGHTS_TAG
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes
from tests.support.recipe_runs import runs_of

pytestmark = pytest.mark.usefixtures("undrawn_figures")
COLOURS = {"mean": [0.1, 0.1, 0.1], "std": [0.3, 0.3, 0.3]}


def write_weights(file: Path, seed: int = 7) -> dict[str, torch.Tensor]:
    """Weights of the small recipe's network, behind a prefix and beside a head."""
    torch.manual_seed(seed)
    state = Encoder(recipes.RECIPE["encoder"], 8).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({**{f"module.{name}": tensor for name, tensor in state.items()}, "fc.weight": torch.ones(3, 2)}, file)
    return state


def make_recipe(
    folder: Path, weights: Path | str | None, stages: dict[str, Any] | None = None, **encoder: Any
) -> Recipe:
    raw: dict[str, Any] = json.loads(json.dumps({**recipes.RECIPE, "storage": str(folder / "runs")}))
    raw["encoder"] |= {"weights": None if weights is None else str(weights), **COLOURS, **encoder}
    raw["encoder"] = {key: value for key, value in raw["encoder"].items() if value != "leave out"}
    return parse_recipe(
        {**raw, "stages": {name: {"kind": name, **stage} for name, stage in (stages or raw["stages"]).items()}}
    )


def run_shown(recipe: Recipe, only: str | None = None) -> tuple[RecipeRun, str]:
    out = io.StringIO()
    return run_recipe(recipe, Console(file=out, width=200), only), out.getvalue()


EVALUATE = {"kind": "evaluate", "knn_k": 5, "probe_weight_decays": [0.001]}


def test_pretraining_continues_from_the_given_weights(tmp_path: Path) -> None:
    state = write_weights(tmp_path / "w.safetensors")
    pretrain = {**recipes.RECIPE["stages"]["pretrain"], "epochs": 1}
    still = {**pretrain, "optimizer": {"name": "SGD", "lr": 1e-30}}
    run, told = run_shown(make_recipe(tmp_path, tmp_path / "w.safetensors", {"pretrain": still}, licence="CC0"))
    assert "encoder.weights: " in told
    assert "names behind 'module.'" in told
    made = load_encoder(run.instances[0].folder / "encoder", 8).state_dict()
    for name, tensor in state.items():
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-20)
    recipe = make_recipe(tmp_path / "b", tmp_path / "w.safetensors", {"pretrain": {**still, "encoder": "random"}})
    other, _ = run_shown(recipe)
    fresh = load_encoder(other.instances[0].folder / "encoder", 8).state_dict()
    assert not torch.equal(fresh["stages.0.0.weight"], state["stages.0.0.weight"])
    tags = runs_of(recipe)["pretrain seed 0"].data.tags
    assert WEIGHTS_TAG not in tags, "the training from fresh weights uses none"


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    write_weights(tmp_path / "a" / "w.safetensors")
    stages = {"evaluate": EVALUATE}
    recipe = make_recipe(tmp_path, tmp_path / "a" / "w.safetensors", stages, licence="CC0")
    first, _ = run_shown(recipe)
    tags = runs_of(recipe)["evaluate seed 0"].data.tags
    assert tags[WEIGHTS_TAG] == str(tmp_path / "a" / "w.safetensors")
    assert tags[f"{WEIGHTS_TAG}.licence"] == "CC0"
    assert len(tags[f"{WEIGHTS_TAG}.sha256"]) == 64
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved, told = run_shown(make_recipe(tmp_path, tmp_path / "b" / "w.safetensors", stages, licence="CC0"))
    assert moved.instances[0].folder == first.instances[0].folder
    assert "finished before, unchanged" in told
    write_weights(tmp_path / "b" / "w.safetensors", seed=8)
    changed, _ = run_shown(make_recipe(tmp_path, tmp_path / "b" / "w.safetensors", stages, licence="CC0"))
    assert changed.instances[0].folder != first.instances[0].folder


def test_origin_of_weights_follows_all_that_comes_from_them(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    pretrain = {**recipes.RECIPE["stages"]["pretrain"], "epochs": 1}
    tune = {**recipes.RECIPE["stages"]["finetune"], "learning_rates": []}
    stages = {
        "pretrain": pretrain,
        "finetune": {**tune, "arms": ["pretrained", "scratch"]},
        "given": {**tune, "kind": "finetune", "arms": ["given", "scratch"]},
        "scratch": {**tune, "kind": "finetune", "arms": ["scratch"]},
        "export": {"formats": ["safetensors"]},
    }
    recipe = make_recipe(tmp_path, tmp_path / "w.safetensors", stages, licence="Only <b>for</b> us")
    first, _ = run_shown(recipe)
    folders = {one.stage: one.folder for one in first.instances}
    origin = read_encoder_description(folders["pretrain"] / "encoder")["weights"]
    assert origin.pop("sha256")
    assert origin == {"source": "w.safetensors", "layout": "firstlight", "licence": "Only <b>for</b> us"}
    for stage, folder in {"finetune": "model", "given": "model", "export": "export/safetensors"}.items():
        told = read_encoder_description(folders[stage] / folder)["weights"]
        assert told["source"] == "w.safetensors", stage
        assert told["licence"] == "Only <b>for</b> us", stage
    assert "weights" not in read_encoder_description(folders["scratch"] / "model")
    for stage, card in {"finetune": "model", "given": "model", "export": "export"}.items():
        text = (folders[stage] / card / "card.md").read_text("utf-8")
        assert 'license: "other"\nlicense_name: "only-b-for-b-us"' in text, stage
        assert "their licence governs it: `Only <b>for</b> us`" in text, stage
        assert str(tmp_path) not in text, stage
    assert 'license: "unknown"' in (folders["scratch"] / "model" / "card.md").read_text("utf-8")
    # Another recipe takes the encoder from MLflow, and knows nothing of the weights.
    reference = f"runs:/{runs_of(recipe)['pretrain seed 0'].info.run_id}/encoder"
    later = make_recipe(tmp_path, None, {"export": {"formats": ["safetensors"], "encoder": reference}})
    second, _ = run_shown(later)
    assert read_encoder_description(second.instances[0].folder / "export/safetensors")["weights"]["sha256"]
    assert "`Only <b>for</b> us`" in (second.instances[0].folder / "export/card.md").read_text("utf-8")


def test_licence_that_is_stated_later_repeats_no_training(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    stages = {
        "pretrain": {**recipes.RECIPE["stages"]["pretrain"], "epochs": 1},
        "export": {"formats": ["safetensors"]},
    }
    first, _ = run_shown(make_recipe(tmp_path, tmp_path / "w.safetensors", stages))
    second, _ = run_shown(make_recipe(tmp_path, tmp_path / "w.safetensors", stages, licence="mit"))
    assert second.instances[0].folder == first.instances[0].folder
    assert second.instances[1].folder != first.instances[1].folder, "its files have the licence"
    assert 'license: "mit"' in (second.instances[1].folder / "export/card.md").read_text("utf-8")


def test_an_encoder_in_mlflow_is_continued_with_another_method(tmp_path: Path) -> None:
    pretrain = {**recipes.RECIPE["stages"]["pretrain"], "epochs": 1}
    run_shown(make_recipe(tmp_path, None, {"pretrain": pretrain}))
    reference = f"runs:/{runs_of(make_recipe(tmp_path, 'x'))['pretrain seed 0'].info.run_id}/encoder"
    method = {"name": "spatial_contrasting", "patch_size": 1}
    stages = {"pretrain": {**pretrain, "method": method}, "evaluate": EVALUATE}
    recipe = make_recipe(tmp_path, reference, stages, mean="leave out", std="leave out")
    second, told = run_shown(recipe)
    assert f"encoder.weights: {reference}" in told
    assert "encoder.mean: [0.1, 0.1, 0.1]" in told
    assert second.instances[0].encoder is not None
    assert read_encoder_description(second.instances[0].encoder)["seed"] == 0
    later = {"pretrain": {**pretrain, "method": method, "encoder": reference}}
    third, _ = run_shown(make_recipe(tmp_path, None, later))
    one, two = (load_encoder(run.instances[0].folder / "encoder", 8).state_dict() for run in (second, third))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


@pytest.mark.parametrize(
    ("kind", "start", "made"),
    [
        ("evaluate", {"probe_weight_decays": [0.001]}, {"given", "random"}),
        ("embed", {}, {"encoder", "files"}),
        ("retrieve", {"queries": "test"}, {"given", "random"}),
        ("export", {"formats": ["safetensors"]}, {"formats"}),
    ],
)
def test_stage_works_from_weights_alone(tmp_path: Path, kind: str, start: dict[str, Any], made: set[str]) -> None:
    write_weights(tmp_path / "w.safetensors")
    run, _ = run_shown(make_recipe(tmp_path, tmp_path / "w.safetensors", {kind: start}))
    (instance,) = run.instances
    assert instance.result is not None
    assert made <= instance.result.keys()


def test_source_of_each_stage_follows_the_recipe(tmp_path: Path) -> None:
    pretrain = recipes.RECIPE["stages"]["pretrain"]
    stages = {
        "before": EVALUATE,
        "scratch": {**pretrain, "kind": "pretrain", "encoder": "random"},
        "of_scratch": EVALUATE,
        "continued": {**pretrain, "kind": "pretrain"},
        "of_continued": EVALUATE,
        "off_the_shelf": {**EVALUATE, "encoder": "given"},
        "longer": {**pretrain, "kind": "pretrain", "encoder": "previous"},
    }
    recipe = make_recipe(tmp_path, "w.safetensors", stages)
    given = EncoderSource(is_given=True)
    assert {name: recipe.encoder_source(name) for name in stages} == {
        "before": None,
        "scratch": None,
        "of_scratch": EncoderSource(stage="scratch"),
        "continued": given,
        "of_continued": EncoderSource(stage="continued"),
        "off_the_shelf": None,
        "longer": EncoderSource(stage="continued"),
    }
    arms = {name: stage.arms for name, stage in recipe.stages.items() if stage.kind == "evaluate"}
    assert arms == {
        "before": ("given", "random"),
        "of_scratch": ("pretrained", "given", "random"),
        "of_continued": ("pretrained", "given", "random"),
        "off_the_shelf": ("given", "random"),
    }
    assert parse_recipe(recipe.dump()) == recipe


@pytest.mark.parametrize(
    ("weights", "encoder", "message"),
    [
        ("nowhere.safetensors", {}, "encoder.weights: 'nowhere.safetensors' does not exist; valid: a file or folder"),
        ("models:/none@current", {}, "encoder.weights: 'models:/none@current' is not in "),
        ("{}/w.safetensors", {"width": 8}, "encoder.weights: '{}/w.safetensors' does not fit convnet: "),
        ("{}/w.safetensors", {"mean": "leave out"}, "encoder.mean: is needed, since encoder.weights does not say"),
        ("{}/text.safetensors", {}, "encoder.weights: "),
        ("timm:a1_in1k", {}, "encoder.weights: 'timm:a1_in1k': timm has no network like encoder.name: convnet"),
    ],
)
def test_wrong_weights_are_one_line_before_any_image_is_read(
    tmp_path: Path, weights: str, encoder: dict[str, Any], message: str
) -> None:
    write_weights(tmp_path / "w.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UserError) as caught:
        run_shown(make_recipe(tmp_path, weights.format(tmp_path), {"evaluate": EVALUATE}, **encoder))
    assert str(caught.value).startswith(message.format(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "runs" / "stores").exists()


@pytest.mark.parametrize("kind", ["evaluate", "embed", "export"])
def test_start_without_weights_is_refused_with_what_is_valid(tmp_path: Path, kind: str) -> None:
    for encoder in ({}, {"encoder": "given"}):
        with pytest.raises(UserError, match=rf"stages\.{kind}\.encoder: .*encoder\.weights"):
            make_recipe(tmp_path, None, {kind: encoder})


def test_unused_weights_are_not_opened(tmp_path: Path) -> None:
    pretrain = {**recipes.RECIPE["stages"]["pretrain"], "epochs": 1, "encoder": "random"}
    run, told = run_shown(make_recipe(tmp_path, "nowhere.safetensors", {"pretrain": pretrain}))
    assert run.instances[0].result is not None
    assert "encoder.weights" not in told

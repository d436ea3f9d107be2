"""The export stage writes the formats of encoders and of models, with a manifest and a card."""

import json
from pathlib import Path

import mlflow
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.export import ExportStage
from firstlight.pipeline.tracking.location import TrackingLocation
from tests.support import recipes
from tests.support.exported_models import export_encoder, export_recipe

pytestmark = pytest.mark.usefixtures("undrawn_figures")
QUIET = Console(quiet=True)


def test_manifest_lists_the_files_of_all_formats(tmp_path: Path, digits: Store) -> None:
    spec = {"name": "timm", "model": "test_resnet"}
    instance, _, _ = export_encoder(tmp_path, digits, spec, 64, formats=["timm", "safetensors"])
    folder, result = instance.folder / "export", instance.result
    assert result is not None
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {
        f"{format}/{name}": facts for format, its in result["formats"].items() for name, facts in its["files"].items()
    }
    assert "timm/config.json" in manifest["files"]


def test_licence_of_existing_weights_decides_the_result(tmp_path: Path) -> None:
    spec = {"name": "timm", "model": "test_resnet", "weights": "/w.pth", "licence": "cc-by-4.0"}
    first, second = (
        ExportStage().list_deciding_facts(stage, recipe)  # type: ignore[arg-type]
        for recipe in (export_recipe(tmp_path, {**spec, "licence": text}, 64, start="given") for text in ("a", None))
        for stage in [recipe.stages["export"]]
    )
    assert first == {"licence": "a"}
    assert second == {}


@pytest.mark.parametrize("formats", [["onnx", "onnx"], [], ["keras"]])
def test_invalid_formats_are_refused(tmp_path: Path, formats: list[str]) -> None:
    with pytest.raises(UserError, match=r"stages\.export\.formats"):
        export_recipe(tmp_path, {"name": "convnet"}, 8, formats=formats)


def test_recipe_with_export_ends_with_a_model_card(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path, seeds=[0, 1], description="Digits.", **recipes.ONE_PROBE).dump()
    raw["stages"] = {name: raw["stages"][name] for name in ("pretrain", "evaluate")}
    raw["stages"] |= {
        "export": {"kind": "export", "formats": ["safetensors", "onnx"]},
        "embed": {"kind": "embed", "batch_size": 32},
    }
    recipe = parse_recipe(raw)
    rows = run_recipe(recipe, QUIET).rows
    cards = {
        file.parts[-3][: len("export-seed0")]: file.read_text()
        for file in (tmp_path / "small").glob("export-seed*/export/card.md")
    }
    assert set(cards) == {"export-seed0", "export-seed1"}
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    found = {
        r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("firstlight").experiment_id])
    }
    for seed in (0, 1):
        text = cards[f"export-seed{seed}"]
        assert text.startswith("---\nlicense: ")
        assert (
            f"| evaluate | kNN (k=5) | {100 * rows[0].pretrained[seed]:.2f} | "
            f"{100 * rows[0].baseline[seed]:.2f} (random weights) |" in text
        )
        assert f"runs:/{found[f'pretrain seed {seed}'].info.run_id}" in text
        assert "Targets are exchanged" in text
        assert str(tmp_path) not in text
        told = found[f"export seed {seed}"]
        assert told.data.tags["mlflow.note.content"] == text
        assert {a.path for a in client.list_artifacts(told.info.run_id, "export")} == {
            f"export/{n}" for n in ("card.md", "manifest.json", "onnx", "safetensors")
        }
        assert told.data.metrics["onnx/relative_difference"] <= 1e-4
    (folder,) = (tmp_path / "small").glob("export-seed0-*")
    (before,) = (tmp_path / "small").glob("pretrain-seed0-*")
    own, copy = (load_encoder(path, 8).state_dict() for path in (before / "encoder", folder / "export/safetensors"))
    assert all(torch.equal(own[key], copy[key]) for key in own)
    assert json.loads((folder / "export/safetensors/encoder.json").read_text())["method"]["name"] == "nat"
    assert load_file(folder / "export/safetensors/encoder.safetensors").keys() == own.keys()
    # A stage of this kind alone, when all is done: nothing is run, and the card keeps its numbers.
    (folder / "export/card.md").unlink()
    run_recipe(recipe, QUIET, only="export")
    assert (folder / "export/card.md").read_text() == cards["export-seed0"]


def test_model_needs_a_fine_tuning_before_it(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path).dump()
    stages = {"pretrain": raw["stages"]["pretrain"], "export": {"kind": "export", "what": "model"}}
    with pytest.raises(UserError, match=r"stages.export.encoder: 'previous' needs a finetune stage before it"):
        parse_recipe({**raw, "stages": stages})


def test_export_of_a_registered_encoder_as_a_model_is_a_one_line_error(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path, stages__pretrain__register_as="only-encoder").dump()
    run_recipe(parse_recipe({**raw, "stages": {"pretrain": raw["stages"]["pretrain"]}}), QUIET)
    stages = {"export": {"kind": "export", "what": "model", "encoder": "models:/only-encoder@current"}}
    with pytest.raises(
        UserError, match=r"an encoder without a task; valid: the folder `model` of a stage finetune"
    ) as told:
        run_recipe(parse_recipe({**raw, "name": "other", "stages": stages}), QUIET)
    assert "\n" not in str(told.value)


def test_recipe_with_a_fine_tuning_and_its_export_ends_with_cards_of_both(tmp_path: Path) -> None:
    tuned = {"stages__finetune__register_as": "digits", "stages__finetune__learning_rates": []}
    raw = recipes.recipe(tmp_path, seeds=[0, 1], **tuned).dump()
    raw["stages"] = {name: raw["stages"][name] for name in ("pretrain", "finetune")}
    raw["stages"] |= {"export": {"kind": "export", "what": "model", "formats": ["safetensors"]}}
    recipe = parse_recipe(raw)
    (row,) = run_recipe(recipe, QUIET).rows
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("firstlight").experiment_id])}
    for kind, folder in (("finetune", "model"), ("export", "export")):
        for seed in (0, 1):
            (file,) = (tmp_path / "small").glob(f"{kind}-seed{seed}-*/{folder}/card.md")
            text = file.read_text("utf-8")
            assert f"| {100 * row.pretrained[seed]:.2f} | {100 * row.baseline[seed]:.2f} (scratch)" in text
            assert str(tmp_path) not in text
            told = runs[f"{kind} seed {seed}"]
            assert f"{folder}/card.md" in {a.path for a in client.list_artifacts(told.info.run_id, folder)}
            assert told.data.tags["mlflow.note.content"] == text
    assert f"runs:/{runs['finetune seed 0'].info.run_id}" in runs["export seed 0"].data.tags["mlflow.note.content"]
    version = client.get_model_version_by_alias("digits", "current")
    assert version.run_id == runs["finetune seed 0"].info.run_id
    assert version.description.startswith("---\nlicense: ")
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    logged = {a.path for a in client.list_logged_model_artifacts(output.model_id)}
    assert logged == {
        "card.md",
        "encoder.json",
        "encoder.safetensors",
        "manifest.json",
        "task.json",
        "task.safetensors",
    }
    assert runs["export seed 0"].data.tags["firstlight.encoder"] == f"runs:/{version.run_id}/model"

"""The export stage writes files that give the encoder's features, or none, and a model card whose code runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.manifest import file_sha256
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.report.cards import model_card
from firstlight.pipeline.report.cards.fine_tuned_card import write_exported_card
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages import export
from firstlight.pipeline.stages.artifacts import load_encoder, save_encoder
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weights.weight_sources import find_weights
from tests.support import recipes
from tests.support.blank_figures import save_blank
from tests.support.exported_models import export_model, run_card_code
from tests.support.paths import ROOT
from tests.support.saved_models import CLASSES, MODELS, save_small_model

QUIET = Console(quiet=True)


def recipe_with(storage: Path, encoder: dict[str, Any], size: int, **stage: Any) -> Recipe:
    """Only an export stage, of an encoder by reference, or of `start`."""
    raw = recipes.recipe(storage, encoder=encoder, dataset__image_size=size).dump()
    section = {"kind": "export", "encoder": stage.pop("start", "models:/none/1"), **stage}
    return parse_recipe({**raw, "stages": {"export": section}})


def exported(
    storage: Path, digits: Store, encoder: dict[str, Any], size: int, **stage: Any
) -> tuple[StageInstance, StageContext, Encoder]:
    """An encoder whose running statistics have moved, exported below `run`."""
    recipe = recipe_with(storage, encoder, size, **stage)
    torch.manual_seed(1)
    made = Encoder(recipe.network_spec, size).train()
    made(torch.rand(4, 3, size, size))
    save_encoder(made, storage / "encoder", {"method": {"name": "nat", "dim": 8}, "store": digits.hash, "seed": 0})
    instance = StageInstance("export", 0, "f", storage / "export-seed0-f", storage / "encoder")
    instance.folder.mkdir(parents=True)
    worker = StageContext.create(recipe, digits, on_ray=False)
    export.ExportStage().run(worker, recipe.stages["export"], instance)  # type: ignore[arg-type]
    return instance, worker, made.eval()


@pytest.mark.parametrize(
    ("encoder", "size", "formats"),
    [
        ({"name": "resnet18"}, 64, {"torchvision", "timm", "safetensors", "onnx", "torch_export"}),
        (
            {"name": "timm", "model": "resnet10t", "normalize": "image"},
            64,
            {"timm", "safetensors", "onnx", "torch_export"},
        ),
        ({"name": "convnet", "width": 4, "depth": 2, "input": "rgb_sobel"}, 8, {"safetensors", "onnx", "torch_export"}),
        (
            {"name": "timm", "model": "test_vit", "img_size": 32},
            32,
            {"timm", "safetensors", "onnx", "torch_export"},
        ),
        ({"name": "timm", "model": "test_efficientnet"}, 64, {"timm", "safetensors", "onnx", "torch_export"}),
    ],
    ids=["resnet18", "timm", "convnet", "vit", "efficientnet"],
)
def test_every_format_is_exported_and_the_card_code_runs(
    tmp_path: Path, digits: Store, encoder: dict[str, Any], size: int, formats: set[str]
) -> None:
    instance, worker, made = exported(tmp_path, digits, encoder, size)
    result, folder = instance.result, instance.folder / "export"
    assert result is not None
    assert set(result["formats"]) == {path.name for path in folder.iterdir() if path.is_dir()} == formats
    assert set(result["left_out"]) == {"torchvision", "timm"} - formats
    for format, facts in result["formats"].items():
        assert {test: found["images"] for test, found in facts["difference"].items()} == {
            "store": 8,
            "random 1": 1,
            "random 5": 5,
        }
        assert all(found["relative"] <= 1e-4 for found in facts["difference"].values())
        assert {name: file["sha256"] for name, file in facts["files"].items()} == {
            f.name: file_sha256(f) for f in (folder / format).iterdir()
        }
    text = model_card.write_card(worker, instance, [], [], {"encoder": "runs:/1"})
    assert text is not None
    assert model_card.write_card(worker, instance, [], [], {"encoder": "runs:/1"}) is None, (
        "the same card is not written again"
    )
    assert str(tmp_path) not in text
    assert digits.hash in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == len(formats)
    check_card_code(blocks, folder, made)


def check_card_code(blocks: list[str], folder: Path, made: Encoder) -> None:
    """Runs the code blocks of a card in a new process and compares their (2, C) features with the encoder's."""
    size = made.image_size
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(9))
    np.save(folder.parent / "x.npy", x.numpy())
    given = re.compile(r"^images = (numpy|torch).*$", re.M)
    loaded = "__import__('numpy').load('../x.npy')"
    load = {"numpy": f"images = {loaded}", "torch": f"images = torch.from_numpy({loaded})"}
    assert all(given.search(block) for block in blocks)
    ready = [given.sub(lambda match: load[match.group(1)], block) for block in blocks]
    program = "import numpy, torch\nfound = []\ntorch.set_num_threads(1)\ntorch.set_grad_enabled(False)\n"
    program += f"for block in {ready!r}:\n    names = {{}}\n    exec(block, names)\n"
    program += "    found.append(numpy.asarray(names['features']))\n"
    program += "numpy.save('../found.npy', numpy.stack(found))\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        own = made(x)[-1].mean((2, 3)).numpy()
    for found in np.load(folder.parent / "found.npy"):
        assert np.abs(found - own).max() <= 1e-4 * np.abs(own).max()


def test_manifest_lists_the_files_of_all_formats(tmp_path: Path, digits: Store) -> None:
    spec = {"name": "timm", "model": "test_resnet"}
    instance, _, _ = exported(tmp_path, digits, spec, 64, formats=["timm", "safetensors"])
    folder, result = instance.folder / "export", instance.result
    assert result is not None
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {
        f"{format}/{name}": facts for format, its in result["formats"].items() for name, facts in its["files"].items()
    }
    assert "timm/config.json" in manifest["files"]


def test_folder_that_timm_does_not_load_by_its_name_is_told(tmp_path: Path, digits: Store) -> None:
    spec = {"name": "timm", "model": "test_resnet", "normalize": "image"}
    instance, worker, _ = exported(tmp_path, digits, spec, 64, formats=["timm"])
    result = instance.result
    assert result is not None
    reason = "encoder.normalize: image is no mean and standard deviation of all images"
    assert result["formats"]["timm"]["not_by_name"] == reason
    assert f"cannot load it by name: {reason}" in (instance.folder / "metrics.jsonl").read_text()
    assert f"`{reason}`" in model_card.render_card(worker, instance, [], [], {})


def test_licence_of_existing_weights_is_in_every_format_that_has_a_place_for_it(tmp_path: Path, digits: Store) -> None:
    spec = {"name": "timm", "model": "test_resnet", "weights": "/w.pth", "licence": "cc-by-4.0"}
    instance, _, _ = exported(tmp_path, digits, spec, 64, formats=["timm", "safetensors"], start="given")
    folder = instance.folder / "export"
    assert json.loads((folder / "timm/config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-4.0"
    origin = json.loads((folder / "safetensors/encoder.json").read_text())["weights"]
    assert origin == {"source": "w.pth", "licence": "cc-by-4.0"}
    assert find_weights(str(folder), spec).licence == "cc-by-4.0"
    assert find_weights(str(folder / "timm"), spec).licence == "cc-by-4.0"
    first, second = (
        export.ExportStage().list_deciding_facts(stage, recipe)  # type: ignore[arg-type]
        for recipe in (recipe_with(tmp_path, {**spec, "licence": text}, 64, start="given") for text in ("a", None))
        for stage in [recipe.stages["export"]]
    )
    assert first == {"licence": "a"}
    assert second == {}


def test_an_onnx_file_is_checked_by_onnx_and_takes_any_number_of_images(tmp_path: Path, digits: Store) -> None:
    instance, _, made = exported(
        tmp_path, digits, {"name": "convnet", "width": 4, "depth": 2, "input": "sobel"}, 8, formats=["onnx"]
    )
    file = instance.folder / "export/onnx/encoder.onnx"
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    session = onnxruntime.InferenceSession(file)
    for count in (1, 3, 16):
        x = torch.rand(count, 3, 8, 8)
        features, map_ = session.run(["features", "map"], {"images": x.numpy()})
        with torch.no_grad():
            own = made(x)[-1]
        assert features.shape == (count, own.shape[1])
        assert np.allclose(map_, own.numpy(), atol=1e-4 * float(own.abs().max()))


def test_format_that_differs_is_refused_and_leaves_no_file(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = export.Counterpart.library_state

    def wrong(self: Any, encoder: Encoder) -> dict[str, torch.Tensor]:
        state = honest(self, encoder)
        # Not when preflight asks whether there is a counterpart.
        state["bn1.bias"] = state["bn1.bias"] + 1e-2 * (len(calls) > 1)
        calls.append(1)
        return state

    calls: list[int] = []
    monkeypatch.setattr(export.Counterpart, "library_state", wrong)
    with pytest.raises(
        StageFailed, match=r"export seed 0: torchvision differs from the encoder by .* of its largest value"
    ) as caught:
        exported(tmp_path, digits, {"name": "resnet18"}, 64, formats=["safetensors", "torchvision"])
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("export-*/export*"))
    assert not list(tmp_path.glob("export-*/result.json"))


@pytest.mark.parametrize(
    ("encoder", "size", "format", "message"),
    [
        (
            {"name": "alexnet"},
            64,
            "torchvision",
            "torchvision has no network like encoder.name: alexnet; valid: safetensors, onnx, torch_export",
        ),
        ({"name": "resnet18", "stem": "cifar"}, 32, "timm", "encoder.stem: cifar; valid: safetensors"),
        ({"name": "resnet18", "norm": "group"}, 64, "torchvision", "encoder.norm: group; valid: safetensors"),
        (
            {"name": "timm", "model": "resnet10t"},
            64,
            "torchvision",
            "it is 'resnet10t' of timm; valid: timm, safetensors, onnx, torch_export",
        ),
    ],
)
def test_unavailable_format_is_one_line_before_any_work(
    tmp_path: Path, encoder: dict[str, Any], size: int, format: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_recipe(recipe_with(tmp_path, encoder, size, formats=["onnx", format]), QUIET)
    assert str(caught.value).startswith(f"stages.export.formats: '{format}' is not valid: ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("formats", [["onnx", "onnx"], [], ["keras"]])
def test_invalid_formats_are_refused(tmp_path: Path, formats: list[str]) -> None:
    with pytest.raises(UserError, match=r"stages\.export\.formats"):
        recipe_with(tmp_path, {"name": "convnet"}, 8, formats=formats)


def test_a_card_that_is_too_long_for_a_tag_ends_with_a_whole_section(tmp_path: Path) -> None:
    tracking = TrackingClient(recipes.recipe(tmp_path))
    run_id = tracking.start_run("r", tmp_path / "run.json", {}, {})
    (tmp_path / "card.md").write_text("x")
    tracking.log_model_card(run_id, tmp_path / "card.md", "# A\n" + "a" * 5000 + "\n## B\n" + "b" * 5000, "export")
    note = tracking.client.get_run(run_id).data.tags["mlflow.note.content"]
    assert note == "# A\n" + "a" * 5000 + "\n\nThe rest is in the artifact export/card.md.\n"


@save_blank()
def test_recipe_with_export_ends_with_a_model_card(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path, seeds=[0, 1], description="Digits.").dump()
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


@pytest.mark.parametrize(
    ("name", "size", "options", "formats"),
    [
        (
            "classify",
            64,
            {"encoder": {"name": "resnet18"}, "hidden": []},
            {"torchvision", "timm", "safetensors", "onnx", "torch_export"},
        ),
        ("multilabel", 8, {}, {"safetensors", "onnx", "torch_export"}),
        ("segment", 16, {}, {"safetensors", "onnx", "torch_export"}),
        ("detect", 32, {}, {"safetensors"}),
    ],
)
def test_whole_model_is_exported_in_the_formats_that_it_has(
    tmp_path: Path,
    digits: Store,
    name: str,
    size: int,
    options: dict[str, Any],
    formats: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MODELS, name, (MODELS[name][0], size, MODELS[name][2]))
    task = save_small_model(tmp_path / "model", name, **options)
    worker, instance = export_model(tmp_path, digits, tmp_path / "model", size)
    result, folder = instance.result, instance.folder / "export"
    assert result is not None
    assert result["what"] == "model"
    assert set(result["formats"]) == {path.name for path in folder.iterdir() if path.is_dir()} == formats
    for facts in result["formats"].values():
        assert all(found["relative"] <= 1e-4 for found in facts["difference"].values())
        assert set(facts["difference"]) == {"store", "random 1", "random 5"}
    text = write_exported_card(worker, instance, [], [], {})
    assert text is not None
    assert len(re.findall(r"```python", text)) == len(formats)
    if name != "detect":
        session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
        told = session.get_modelmeta().custom_metadata_map
        assert json.loads(told["classes"]) == list(CLASSES)
        assert (
            json.loads(told["views"]) == [[{"op": op["op"], **op} for op in MODELS[name][2]]]
            or "scale" in told["views"]
        )
        images = torch.rand(3, 3, size, size)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            own = task.compute_logits(images)  # type: ignore[operator]
        assert logits.shape == own.shape
        assert np.allclose(logits, own.numpy(), atol=1e-4 * float(own.abs().max()))
    assert read_model(folder / "safetensors").classes == CLASSES


@pytest.mark.parametrize("format", ["torchvision", "timm"])
def test_code_of_a_library_gives_the_logits_of_the_model(
    tmp_path: Path, digits: Store, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "classify", ({}, 64, MODELS["classify"][2]))
    task = save_small_model(tmp_path / "model", "classify", encoder={"name": "resnet18"})
    worker, instance = export_model(tmp_path, digits, tmp_path / "model", 64, formats=[format])
    text = write_exported_card(worker, instance, [], [], {})
    assert text is not None
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    np.save(tmp_path / "x.npy", images.numpy())
    given = re.sub(
        r"^images = .*$",
        f"images = torch.from_numpy(__import__('numpy').load({str(tmp_path / 'x.npy')!r}))",
        code,
        flags=re.M,
    )
    save = f"\n__import__('numpy').save({str(tmp_path / 'found.npy')!r}, logits.numpy())\n"
    run_card_code(given + save, instance.folder / "export")
    with torch.no_grad():
        own = task.compute_logits(images).numpy()  # type: ignore[operator]
    assert np.abs(np.load(tmp_path / "found.npy") - own).max() <= 1e-4 * np.abs(own).max()


@pytest.mark.parametrize(
    ("task", "format", "message"),
    [
        ({"name": "classify", "hidden": [4]}, "timm", "'timm' is not valid: the libraries' heads are one linear layer"),
        (
            {"name": "classify_square"},
            "torchvision",
            "classifiers that give logits; valid: safetensors, onnx, torch_export",
        ),
    ],
)
def test_format_that_a_model_will_not_have_is_one_line_before_any_work(
    tmp_path: Path, task: dict[str, Any], format: str, message: str
) -> None:
    raw = recipes.recipe(tmp_path, stages__finetune__task=task, stages__finetune__arms=["scratch"]).dump()
    stages = {"finetune": raw["stages"]["finetune"], "export": {"kind": "export", "what": "model", "formats": [format]}}
    with pytest.raises(UserError) as caught:
        run_recipe(parse_recipe({**raw, "stages": stages}), QUIET)
    assert str(caught.value).startswith(f"stages.export.formats: '{format}' is not valid: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stores").exists()


def test_model_needs_a_fine_tuning_before_it(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path).dump()
    stages = {"pretrain": raw["stages"]["pretrain"], "export": {"kind": "export", "what": "model"}}
    with pytest.raises(UserError, match=r"stages.export.encoder: 'previous' needs a finetune stage before it"):
        parse_recipe({**raw, "stages": stages})


def test_export_of_a_registered_encoder_as_a_model_is_one_line(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path, stages__pretrain__register_as="only-encoder").dump()
    run_recipe(parse_recipe({**raw, "stages": {"pretrain": raw["stages"]["pretrain"]}}), QUIET)
    stages = {"export": {"kind": "export", "what": "model", "encoder": "models:/only-encoder@current"}}
    with pytest.raises(
        UserError, match=r"an encoder without a task; valid: the folder `model` of a stage finetune"
    ) as told:
        run_recipe(parse_recipe({**raw, "name": "other", "stages": stages}), QUIET)
    assert "\n" not in str(told.value)


@save_blank()
def test_recipe_with_a_fine_tuning_and_its_export_ends_with_cards_of_both(tmp_path: Path) -> None:
    raw = recipes.recipe(tmp_path, seeds=[0, 1], stages__finetune__register_as="digits").dump()
    raw["stages"] = {name: raw["stages"][name] for name in ("pretrain", "finetune")}
    raw["stages"] |= {"export": {"kind": "export", "what": "model", "formats": ["onnx"]}}
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

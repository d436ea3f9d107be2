"""Exports of encoders and of small fine-tuned models."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.export import ExportStage
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.folder_manifest import write_manifest
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes

# The first lines of a process without torch and Firstlight.
WITHOUT_TORCH = (
    "import sys\nfor name in ('torch', 'torchvision', 'firstlight', 'timm'):\n    sys.modules[name] = None\n"
)
# The files of an export that holds no network.
EXPORTED_FILES = {
    "timm/model.safetensors": b"weights",
    "timm/config.json": b"{}",
    "onnx/encoder.onnx": b"graph",
}


def export_recipe(storage: Path, encoder: dict[str, Any], size: int, **stage: Any) -> Recipe:
    """Returns a recipe of an export stage alone, of an encoder by reference, or of `start`."""
    raw = recipes.recipe(storage, encoder=encoder, dataset__image_size=size).dump()
    section = {"kind": "export", "encoder": stage.pop("start", "models:/none/1"), **stage}
    return parse_recipe({**raw, "stages": {"export": section}})


def export_encoder(
    storage: Path, digits: Store, encoder: dict[str, Any], size: int, **stage: Any
) -> tuple[StageInstance, StageContext, Encoder]:
    """Exports an encoder whose running statistics have moved, by a recipe with this stage alone."""
    recipe = export_recipe(storage, encoder, size, **stage)
    torch.manual_seed(1)
    made = Encoder(recipe.network_spec, size).train()
    made(torch.rand(4, 3, size, size))
    save_encoder(made, storage / "encoder", {"method": {"name": "nat", "dim": 8}, "store": digits.hash, "seed": 0})
    instance = StageInstance("export", 0, "f", storage / "export-seed0-f", storage / "encoder")
    instance.folder.mkdir(parents=True)
    context = StageContext.create(recipe, digits, on_ray=False)
    ExportStage().run(context, recipe.stages["export"], instance)  # type: ignore[arg-type]
    return instance, context, made.eval()


def export_model(
    storage: Path, store: Store, model: Path, size: int, **stage: Any
) -> tuple[StageContext, StageInstance]:
    """Exports the model in a folder, by a recipe with this stage alone."""
    raw = recipes.recipe(storage, dataset__image_size=size).dump()
    section = {"kind": "export", "what": "model", "encoder": "models:/none/1", **stage}
    recipe = parse_recipe({**raw, "stages": {"export": section}})
    instance = StageInstance("export", 0, "f", storage / "export-seed0-f", model)
    instance.folder.mkdir(parents=True, exist_ok=True)
    context = StageContext.create(recipe, store, on_ray=False)
    ExportStage().run(context, recipe.stages["export"], instance)  # type: ignore[arg-type]
    return context, instance


def write_export(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Writes a folder as a stage export leaves it, with files that hold no network."""
    entries = {}
    for name, data in (EXPORTED_FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, entries)
    (folder / "card.md").write_text('---\nlicense: "mit"\n---\n\n# Card\n')
    return folder

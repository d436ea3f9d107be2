"""The formats of a whole fine-tuned model."""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.files import write_flushed
from firstlight.pipeline.stages.exporting.comparison import NetworkAnswer
from firstlight.pipeline.stages.exporting.loading_by_name import load_by_name
from firstlight.pipeline.stages.exporting.program_files import write_onnx, write_torch_program
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FILES, SavedModel, read_model
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST
from firstlight.tasks.downstream.model_formats import (
    ClassifierCounterpart,
    ModelGraph,
    explain_missing_model_format,
    export_model_program,
    find_classifier,
)
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.downstream.whole_images import ImageViews
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.timm_folder import describe_for_timm


@dataclass(frozen=True)
class ModelExporter:
    """Writes a fine-tuned model in each format, as `EncoderExporter` does an encoder."""

    model: SavedModel
    instance: StageInstance
    origin: Mapping[str, str]
    what = "model"

    @property
    def encoder(self) -> Encoder:
        return self.model.task.encoder

    def answer_images(self, images: Tensor) -> tuple[Tensor, ...]:
        return answer_with_model(self.model.task, images)

    def explain_missing(self, format: str) -> str | None:
        """Returns the reason why the model cannot be exported in a format; None if it can."""
        return explain_missing_saved_format(self.model, format)

    @cached_property
    def program(self) -> Any:
        return export_model_program(self.model.task)

    def torchvision(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_classifier(self.model.task, "torchvision"))

    def timm(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_classifier(self.model.task, "timm"))

    def _state_dict(self, folder: Path, found: ClassifierCounterpart) -> tuple[NetworkAnswer, dict[str, Any]]:
        library, network = found.encoder.library, found.encoder.model
        facts = {"format": "pt", "model": network, "library": library, "classes": json.dumps(self.model.classes)}
        write_flushed(folder / "model.safetensors", save_tensors(found.library_state(self.model.task), facts))
        net = found.build_network(load_tensors((folder / "model.safetensors").read_bytes()))
        named, by_name = None, dict[str, Any]()
        if library == "timm":
            content = describe_for_timm(
                self.encoder, network, found.encoder.options, self.model.classes, self.origin.get("licence")
            )
            named, by_name = load_by_name(folder, self.encoder, content, lambda _: True)
        network_there = named.network if named else net
        about = {"model": network, "options": dict(found.encoder.options), "classes": found.classes}
        about |= {"head": found.head_name, "version": importlib.metadata.version(library), **by_name}
        return lambda images: (network_there(self.encoder.input(images)),), about

    def safetensors(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        assert self.instance.encoder is not None
        for name in (*MODEL_FILES, FOLDER_MANIFEST):
            write_flushed(folder / name, (self.instance.encoder / name).read_bytes())
        task = read_model(folder).task
        return lambda images: answer_with_model(task, images), {}

    def torch_export(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        facts = write_torch_program(self.program, folder / "model.pt2")
        network = self.program.module()
        return lambda images: (network(images),), facts

    def onnx(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return write_onnx(self.program, folder / "model.onnx", ["logits"], describe_graph(self.model))


def describe_graph(model: SavedModel) -> dict[str, str]:
    """Returns the metadata of an exported graph: all that someone needs besides the graph to predict with it."""
    return {
        "task": str(model.spec["name"]),
        "classes": json.dumps(model.classes),
        "image_size": str(model.preprocessing.image_size),
        "views": json.dumps(model.preprocessing.views),
        "input": _describe_input(model.preprocessing.pixels),
    }


def _describe_input(pixels: PixelFormat | None) -> str:
    if pixels is None:
        return "images: float32 (B, 3, image_size, image_size), RGB in 0..1; the graph normalises them"
    return (
        f"images: float32 (B, {pixels.channels}, image_size, image_size), {pixels} divided by {pixels.white}; "
        "the graph normalises them"
    )


def explain_missing_saved_format(model: SavedModel, format: str) -> str | None:
    """Returns the reason why a saved model cannot be exported in a format; None if it can."""
    is_padded = any(op["op"] == "fit" for ops in model.preprocessing.views for op in ops)
    return explain_missing_model_format(model.task, format, is_padded)


def answer_with_model(task: Task, images: Tensor) -> tuple[Tensor, ...]:
    """Returns the outputs of a model for images: logits, or the boxes and scores of all objects."""
    if task.target != "boxes":
        return (ModelGraph(task.eval())(images),)
    size = images.shape[-1]
    whole, plain = torch.tensor([[0.0, 0.0, size, size]]), torch.eye(2, 3, dtype=torch.float64)
    found = task.eval().predict_images([ImageViews(one[None], whole, plain[None], (size, size)) for one in images])
    return torch.cat([seen["boxes"] for seen in found]), torch.cat([seen["scores"] for seen in found])

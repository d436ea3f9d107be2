"""Small fine-tuned models in folders, with weights that are drawn from a seed."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from firstlight.pipeline.config.schema import TaskSpec, constructor_arguments
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing, save_model
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.starting_weights import fold_encoder
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.nn.encoders import Encoder

CROP = ({"op": "center_crop"},)
FIT = ({"op": "fit"},)
CLASSES = ("bee", "cat", "dog")
# The settings of a task, the size of its images and its view.
MODELS: dict[str, tuple[dict[str, Any], int, tuple[dict[str, Any], ...]]] = {
    "classify": ({"hidden": [6], "norm": "none"}, 8, CROP),
    "classify_square": ({}, 8, CROP),
    "multilabel": ({}, 8, CROP),
    "segment": ({"norm": "group"}, 16, FIT),
    "detect": ({"anchors": [8, 16], "hidden": 16, "sampled": 16}, 32, FIT),
}


def build_model(
    name: str, *, batch_norm: str = "keep", encoder: dict[str, Any] | None = None, **arguments: Any
) -> tuple[Task, Any]:
    """Returns a task whose statistics have seen images, in evaluation mode, and its section of a recipe."""
    given, size, _ = MODELS[name]
    spec = TypeAdapter(TaskSpec).validate_json(json.dumps({"name": name, **given, **arguments}))
    torch.manual_seed(0)
    small = {"name": "convnet", "width": 4, "depth": 2, "norm": "batch", **(encoder or {})}
    network = Encoder(encoder if encoder and "name" in encoder else small, size).train()
    network(torch.rand(8, 3, size, size) ** 2)
    if batch_norm == "fold":
        fold_encoder(network)
    return TASKS[name](network, len(CLASSES), **constructor_arguments(spec)).eval(), spec


def save_small_model(
    folder: Path,
    name: str,
    *,
    batch_norm: Any = "keep",
    seen: Any = None,
    facts: Any = None,
    classes: tuple[str, str, str] = CLASSES,
    **arguments: Any,
) -> Task:
    """Saves a model with three classes. `seen`: keys of its `Preprocessing`; `facts`: how it was made. Returns its
    task.
    """
    task, spec = build_model(name, batch_norm=batch_norm, **arguments)
    preprocessing = Preprocessing(task.encoder.image_size, **{"views": (MODELS[name][2],), **(seen or {})})
    told = {"arm": "scratch", "lr": 0.1, "labels": 3, "store": "s", "seed": 0, **(facts or {})}
    save_model(task, spec, folder, classes=classes, preprocessing=preprocessing, batch_norm=batch_norm, facts=told)
    return task

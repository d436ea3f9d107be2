"""Fine-tuned models as folders: an encoder's folder with two files more, the task and the weights of its own layers.

    encoder.json, encoder.safetensors   as those of any encoder: a stage of another recipe can start from the folder
    task.json                           the task and its arguments, the classes in order, and how images become views
    task.safetensors                    the task's own layers
    manifest.json                       size and sha256 of each file

Nothing is unpickled: the network is built from the two descriptions, after they were held against the weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import load as load_tensors
from torch import Tensor

from firstlight.pipeline.config.schema import TaskSpec, constructor_arguments, parse_augment
from firstlight.pipeline.data.augment.ops import list_windows
from firstlight.pipeline.data.channels.pixel_format import MAX_CHANNELS, PixelFormat, parse_pixel_format
from firstlight.pipeline.data.images import BadImage
from firstlight.pipeline.data.images.levels import LevelRanges
from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.records import FiniteNumber, RecordShape, parse_record
from firstlight.pipeline.stages.artifacts.artifact_files import write_artifact_files
from firstlight.pipeline.stages.artifacts.encoder_description import ENCODER_SHAPE, LOST_LAYERS_KEY
from firstlight.pipeline.stages.artifacts.encoder_folder import ENCODER_WEIGHTS_FILE, write_encoder_files
from firstlight.pipeline.stages.artifacts.weight_checks import BUILD_ERRORS, check_finite_weights, check_spec_numbers
from firstlight.pipeline.train.folder_manifest import DamagedFileError, read_verified, write_manifest
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.starting_weights import fold_encoder
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.downstream.whole_images import ImageViews
from firstlight.tasks.nn.encoders import Encoder

MODEL_FOLDER = "model"
TASK_FILE, TASK_WEIGHTS_FILE = "task.json", "task.safetensors"
MODEL_FILES = ("encoder.json", ENCODER_WEIGHTS_FILE, TASK_FILE, TASK_WEIGHTS_FILE)
# The most views of an image: ten crops, or the windows that cover a large one.
MAX_VIEWS = 1000
# The classes that a mask of 8 bits can name besides void.
MAX_MASK_CLASSES = 255
AugmentOps = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Preprocessing:
    """The way from an image to the views that a fine-tuned model sees: as its stage scored test images."""

    image_size: int
    # The augmentations of each view.
    views: tuple[AugmentOps, ...]
    # `scale` and `size` of the square windows that cover an image instead; None if `views` are the views.
    windows: dict[str, Any] | None = None
    max_pixels: int = 64_000_000
    # The levels that are black and white in images of more than 8 bits.
    levels: LevelRanges | None = None
    # The format of images with their channels as they are; None: images become RGB of 8 bits.
    pixels: PixelFormat | None = None

    def list_views(self, size: tuple[int, int]) -> tuple[AugmentOps, ...]:
        """Returns the augmentations of the views of an image of `size`, (width, height).

        Raises:
            BadImage: it needs too many windows.
        """
        if self.windows is None:
            return self.views
        found = list_windows(np.array([size]), self.windows["scale"], self.windows["size"])
        if len(found) > MAX_VIEWS:
            raise BadImage(f"needs {len(found)} windows; at most {MAX_VIEWS} are looked at", "too large")
        return found


@dataclass(frozen=True)
class SavedModel:
    """A fine-tuned model that was read from its files: its network in evaluation mode, and what was saved with it."""

    task: Task
    # The section `task` of the recipe.
    spec: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    # The facts of its training: `arm`, `lr`, `labels`, `store` and `seed`.
    facts: dict[str, Any]

    @property
    def target(self) -> str:
        """The kind of target that the model predicts: `label`, `present`, `mask` or `boxes`."""
        return self.task.target


class _WindowsShape(RecordShape):
    """The windows that cover an image."""

    scale: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None
    size: Annotated[int, Field(ge=1, le=2**16)] | None


class _PixelFormatShape(RecordShape):
    """The format of images with their channels as they are."""

    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
    bits: Literal[8, 16]


class _PreprocessingShape(RecordShape):
    """The entry `preprocessing`, besides the size of a view, which stands with the encoder."""

    views: Annotated[list[list[dict[str, Any]]], Field(min_length=1, max_length=MAX_VIEWS)]
    windows: _WindowsShape | None
    max_pixels: Annotated[int, Field(ge=1, le=2**40)]
    levels: dict[str, Annotated[list[FiniteNumber], Field(min_length=2, max_length=2)]]
    pixels: _PixelFormatShape | None = None


class _TaskFileShape(RecordShape):
    """The content of `task.json`."""

    format: Literal[1]
    task: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=1, max_length=2**20)]
    batch_norm: Literal["keep", "fold"]
    preprocessing: _PreprocessingShape


TASK_FILE_SHAPE = TypeAdapter(_TaskFileShape)


def save_model(
    task: Task,
    spec: Any,
    folder: Path,
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    batch_norm: Literal["keep", "fold"],
    facts: Mapping[str, Any],
) -> None:
    """Writes a fine-tuned model. `spec` is its section of the recipe; `facts` say how it was made."""
    described = spec.model_dump(mode="json")
    lost = [f"batch_norm: {batch_norm}"] if batch_norm == "fold" else []
    lost += [f"task.last_pool: {described['last_pool']}"] if described.get("last_pool", "keep") != "keep" else []
    encoder_facts = {"task": described, **facts, **({LOST_LAYERS_KEY: lost} if lost else {})}
    views = asdict(preprocessing)
    views["levels"] = {kind: list(both) for kind, both in (preprocessing.levels or {}).items()}
    del views["image_size"]
    # Models of colours were saved without it.
    if preprocessing.pixels is None:
        del views["pixels"]
    description = {
        "format": 1,
        "task": described,
        "classes": list(classes),
        "batch_norm": batch_norm,
        "preprocessing": views,
        **facts,
    }
    files = write_encoder_files(task.encoder, folder, encoder_facts)
    files |= write_artifact_files(folder, "task", _list_own_tensors(task), description)
    write_manifest(folder, files)


def _list_own_tensors(task: Task) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a task besides those of its encoder, each under its first name."""
    known = {id(tensor) for tensor in task.encoder.state_dict(keep_vars=True).values()}
    found = {}
    for name, tensor in task.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known.add(id(tensor))
            found[name] = tensor
    return found


def read_model(folder: Path) -> SavedModel:
    """Reads a fine-tuned model, on the CPU and in evaluation mode. The caller's random numbers stay as they are.

    Raises:
        UserError: a file is missing, damaged or not a model's; its parts do not fit each other; or they are not those
            of a network that works. The message is one line and names the folder.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return _parse_model(folder)
    except UserError as error:
        raise UserError(f"{folder}: is not a whole fine-tuned model: {one_line(error)}") from None
    except (DamagedFileError, *BUILD_ERRORS, AssertionError, RecursionError) as error:
        raise UserError(
            f"{folder}: is not a whole fine-tuned model: {one_line(error) or type(error).__name__}"
        ) from None


def read_model_description(folder: Path) -> tuple[dict[str, Any], Preprocessing]:
    """Returns what was saved of a fine-tuned model besides its weights: the content of `task.json`, and how it sees
    images.

    Raises:
        UserError: as `read_model`.
    """
    try:
        _, files = read_verified(folder)
        description = parse_record(files[TASK_FILE], TASK_FILE_SHAPE, TASK_FILE)
        encoder = parse_record(files["encoder.json"], ENCODER_SHAPE, "encoder.json")
        return description, _parse_preprocessing(description["preprocessing"], encoder["image_size"])
    except (DamagedFileError, KeyError, ValueError) as error:
        raise UserError(f"{folder}: is not a whole fine-tuned model: {one_line(error)}") from None


def _parse_model(folder: Path) -> SavedModel:
    _, files = read_verified(folder)
    if TASK_FILE not in files and "encoder.json" in files:
        raise UserError("it is an encoder without a task; valid: the folder `model` of a stage finetune")
    if missing := [name for name in MODEL_FILES if name not in files]:
        raise ValueError(f"its manifest lists no {missing[0]}")
    encoder_facts = parse_record(files["encoder.json"], ENCODER_SHAPE, "encoder.json")
    description = parse_record(files[TASK_FILE], TASK_FILE_SHAPE, TASK_FILE)
    encoder_weights, own_weights = load_tensors(files[ENCODER_WEIGHTS_FILE]), load_tensors(files[TASK_WEIGHTS_FILE])
    weights = {**encoder_weights, **{f"task: {name}": tensor for name, tensor in own_weights.items()}}
    check_finite_weights(weights)
    check_spec_numbers(encoder_facts["spec"], weights)
    check_spec_numbers(description["task"], weights, "task")
    spec = TypeAdapter(TaskSpec).validate_json(json.dumps(description["task"]))
    preprocessing = _parse_preprocessing(description["preprocessing"], encoder_facts["image_size"])
    cls, count, arguments = TASKS[spec.name], len(description["classes"]), constructor_arguments(spec)
    _check_use(cls, preprocessing, count)
    with torch.device("meta"):
        skeleton = Encoder(encoder_facts["spec"], preprocessing.image_size)
        expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
        own = {name: tensor.shape for name, tensor in _list_own_tensors(cls(skeleton, count, **arguments)).items()}
    _check_same_tensors("encoder", expected, encoder_weights, is_folded=description["batch_norm"] == "fold")
    _check_same_tensors("task", own, own_weights)
    encoder = Encoder(encoder_facts["spec"], preprocessing.image_size)
    if description["batch_norm"] == "fold":
        fold_encoder(encoder)
    task = cls(encoder, count, **arguments).eval()
    task.encoder.load_state_dict(encoder_weights)
    task.load_state_dict(own_weights, strict=False)
    _check_outputs(task, preprocessing.image_size)
    facts = {key: value for key, value in description.items() if key not in _TaskFileShape.model_fields}
    return SavedModel(task, description["task"], tuple(description["classes"]), preprocessing, facts)


def _parse_preprocessing(description: Mapping[str, Any], image_size: int) -> Preprocessing:
    """Returns the views of a description. Raises ValueError if an augmentation is none."""
    parsed = [parse_augment(ops) for ops in description["views"]]
    views = tuple(tuple(op.model_dump() for op in ops) for ops in parsed)
    levels = {kind: (float(low), float(high)) for kind, (low, high) in description["levels"].items()}
    windows = description["windows"]
    if windows is not None and None not in (windows["scale"], windows["size"]):
        raise ValueError("preprocessing.windows has a scale and a size; valid: one of them")
    pixels = parse_pixel_format(description.get("pixels"))
    return Preprocessing(image_size, views, windows, description["max_pixels"], levels, pixels)


def _check_use(cls: type[Task], preprocessing: Preprocessing, count: int) -> None:
    """Raises ValueError if a task of this kind cannot answer for such views, or for so many classes."""
    if cls.target in ("mask", "boxes") and len(preprocessing.views) != 1:
        raise ValueError(f"preprocessing.views: {len(preprocessing.views)} views of an image are not valid with masks")
    if cls.target != "mask" and preprocessing.windows is not None:
        raise ValueError("preprocessing.windows is valid with masks only")
    if cls.target == "mask" and count > MAX_MASK_CLASSES:
        raise ValueError(f"classes: {count} are too many for masks of 8 bits")


def _check_same_tensors(
    what: str, expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor], is_folded: bool = False
) -> None:
    """Raises ValueError unless the weights have the names and shapes of the network that the description is of.

    An encoder without its batch normalisations may lack vectors, and may have additional biases.
    """
    for name, shape in expected.items():
        if name not in weights:
            if is_folded and len(shape) <= 1:
                continue
            raise ValueError(f"the {what}'s weights have no {name}")
        if weights[name].shape != shape:
            raise ValueError(f"{name} of the {what} has shape {list(weights[name].shape)}, not {list(shape)}")
    for name, tensor in weights.items():
        if name not in expected and not (is_folded and name.endswith(".bias") and tensor.ndim == 1):
            raise ValueError(f"the {what}'s weights have a tensor {name} too many")


@torch.inference_mode()
def _check_outputs(task: Task, size: int) -> None:
    """Raises ValueError unless the outputs for two images of noise are finite: weights may be so large that they are
    not.
    """
    noise = torch.rand(2, task.encoder.image_channels, size, size, generator=torch.Generator().manual_seed(0))
    compute: Any = getattr(task, "compute_logits", None)
    outputs = [compute(noise)] if compute is not None else [*task.encoder(noise), *_list_predictions(task, noise)]
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ValueError("the outputs for an image of noise are not finite")


def _list_predictions(task: Task, noise: Tensor) -> list[Tensor]:
    size = noise.shape[-1]
    whole = torch.tensor([[0.0, 0.0, size, size]])
    images = [ImageViews(one[None], whole, torch.eye(2, 3, dtype=torch.float64)[None], (size, size)) for one in noise]
    return [tensor for found in task.predict_images(images) for tensor in found.values()]

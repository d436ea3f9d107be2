"""Saved networks and tables: a folder of safetensors and JSON files with a manifest, the same on disk and as an MLflow
artifact or logged model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from firstlight.pipeline.config.measures import GIVEN_ARM, is_pretrained_arm
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.records import Count, RecordShape, parse_record
from firstlight.pipeline.train.folder_manifest import DamagedFileError, read_verified, write_file, write_manifest
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.heads import Projection
from firstlight.tasks.nn.weights.weight_sources import name_weights

# Of the facts of an encoder: no image of the store was kept apart from its training.
TRAINED_ON_ALL_KEY = "trained_on_all"
# Of the facts of an encoder: the settings by which a fine-tuning has taken layers out of it.
LOST_LAYERS_KEY = "lost_layers"
# Of the facts of an encoder: the existing weights that it comes from, however much it was trained since: `source`,
# `sha256`, `part`, `layout` and `licence`, as far as they are known.
WEIGHTS_ORIGIN_KEY = "weights"
# The name of the frozen network that a pretraining learns from: among the companions of an instance, and of the facts
# of the encoder that has learned from it, as of its weights.
TEACHER = "teacher"
TRACKED_PREFIXES = ("runs:/", "models:/")
ENCODER_WEIGHTS_FILE = "encoder.safetensors"
# Exceptions of a constructor that gets a spec from a file.
BUILD_ERRORS = (SafetensorError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError)
# Numbers of a spec up to this one are not compared with the weights.
SMALLEST_LIMIT = 1024
Network = TypeVar("Network", bound=nn.Module)


class _EncoderShape(RecordShape):
    """The content of `encoder.json`."""

    spec: dict[str, Any]
    image_size: Annotated[int, Field(ge=1, le=2**11)]
    shapes: list[list[Count]]
    lost_layers: list[str] = Field([])


ENCODER_SHAPE = TypeAdapter(_EncoderShape)


def save_encoder(encoder: Encoder, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the spec and the weights of an encoder. `facts` (its method, its store, its seed) are kept with them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, write_encoder_files(encoder, folder, facts))


def write_encoder_files(encoder: Encoder, folder: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Writes the files of an encoder into a folder that gets a manifest later. Returns their entries of it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    description = {
        "format": 1,
        "spec": encoder.spec,
        "image_size": encoder.image_size,
        "shapes": encoder.shapes,
        **facts,
    }
    files = write_file(folder, ENCODER_WEIGHTS_FILE, save_tensors(weights))
    return files | write_file(folder, "encoder.json", json.dumps(description, indent=1).encode())


def save_network(network: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    """Writes a network that a method makes besides the encoder: `network.spec`, its constructor's keyword arguments,
    and its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    description = {"format": 1, "class": type(network).__name__, "spec": network.spec, **facts}
    files = write_file(folder, "network.safetensors", save_tensors(weights))
    files |= write_file(folder, "network.json", json.dumps(description, indent=1).encode())
    write_manifest(folder, files)


@dataclass(frozen=True)
class SavedTable:
    """A value for each image that a method was trained on."""

    ids: np.ndarray  # (n,) int64, ascending
    values: Tensor  # (n, ...)
    store: str  # the hash of the store of these images


def save_table(table: SavedTable, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the values that a method has kept of its images. `facts` are kept with them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"ids": torch.from_numpy(table.ids.copy()), "values": table.values.detach().cpu().contiguous()}
    shape = list(table.values.shape)
    description = {"format": 1, "shape": shape, **facts, "store": table.store}
    files = write_file(folder, "table.safetensors", save_tensors(tensors))
    files |= write_file(folder, "table.json", json.dumps(description, indent=1).encode())
    write_manifest(folder, files)


def load_table(folder: Path) -> SavedTable:
    """Loads the values that a method has kept of its images.

    Raises:
        UserError: a file is missing, damaged, or not a table's; the message names it.
    """
    try:
        _, files = read_verified(folder)
        description, tensors = json.loads(files["table.json"]), load_tensors(files["table.safetensors"])
        ids, values = tensors["ids"], tensors["values"]
        check_finite_weights(tensors)
        if description["shape"] != list(values.shape):
            raise ValueError(f"table.json has the shape {description['shape']}, its values {list(values.shape)}")
        if ids.dtype != torch.int64 or ids.shape != values.shape[:1] or not bool((ids.diff() > 0).all()):
            raise ValueError("table.safetensors has no ascending ids, one for each value")
        return SavedTable(ids.numpy(), values, str(description["store"]))
    except (DamagedFileError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: is not a whole table: {str(error).splitlines()[0]}") from None


def load_decoder(folder: Path) -> Decoder:
    """Loads the decoder that a denoising auto-encoder was trained with.

    Raises:
        UserError: a file is missing, damaged, or not a decoder's; the message names it.
    """
    return _load_network(folder, Decoder, "decoder")


def load_head(folder: Path) -> Projection:
    """Loads the head that a method trained on its encoder.

    Raises:
        UserError: a file is missing, damaged, or not a head's; the message names it.
    """
    return _load_network(folder, Projection, "head")


def load_companion(folder: Path, what: str) -> nn.Module | SavedTable:
    """Loads the `head`, the `decoder` or the memory `bank` that was saved with an encoder.

    Raises:
        UserError: as `load_head` and `load_table`.
    """
    loaders: dict[str, Callable[[Path], nn.Module | SavedTable]] = {
        "head": load_head,
        "decoder": load_decoder,
        "bank": load_table,
    }
    return loaders[what](folder)


def _load_network(folder: Path, cls: type[Network], what: str) -> Network:
    try:
        _, files = read_verified(folder)
        description = json.loads(files["network.json"])
        if description["class"] != cls.__name__:
            raise ValueError(f"network.json describes a {description['class']}")
        weights = load_tensors(files["network.safetensors"])
        check_finite_weights(weights)
        check_spec_numbers(description["spec"], weights)
        network = cls(**description["spec"])
        network.load_state_dict(weights)
    except (DamagedFileError, *BUILD_ERRORS) as error:
        raise UserError(f"{folder}: is not a whole {what}: {one_line(error)}") from None
    return network


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a number among the weights is not finite; the message names its tensor."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has numbers that are not finite")


def check_spec_numbers(spec: Any, weights: Mapping[str, Tensor], key: str = "spec") -> None:
    """Raises ValueError if a number of a spec is larger than any size of the weights, and than their number of tensors.

    A network of so many channels or layers would be built before its weights are found not to fit.
    """
    for name, value in spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ():
        check_spec_numbers(value, weights, f"{key}.{name}")
    largest = max([len(weights), SMALLEST_LIMIT, *(size for tensor in weights.values() for size in tensor.shape)])
    if isinstance(spec, int) and abs(spec) > largest:
        raise ValueError(f"{key} is {spec}, and no size of the weights is larger than {largest}")


def read_encoder_spec(folder: Path) -> dict[str, Any]:
    """Returns the spec of a saved encoder, after its files were checked.

    Raises:
        UserError: a file is missing, damaged, or not an encoder's; the message names it.
    """
    spec: dict[str, Any] = read_encoder_description(folder)["spec"]
    return spec


def read_encoder_description(folder: Path) -> dict[str, Any]:
    """Returns what was saved of an encoder besides its weights: `spec`, `image_size`, and how it was made.

    Raises:
        UserError: as `read_encoder_spec`.
    """
    try:
        _, files = read_verified(folder)
        return parse_record(files["encoder.json"], ENCODER_SHAPE, "encoder.json")
    except (DamagedFileError, KeyError, ValueError) as error:
        raise UserError(f"{folder}: is not a whole encoder: {one_line(error)}") from None


def trace_weights(recipe: Recipe, name: str, folder: Path, arm: str | None = None) -> dict[str, str]:
    """Returns what is known of the existing weights that a saved network comes from; {} if it comes from none.

    Args:
        name: the stage of the recipe that made the network, starts from it, or hands it on.
        folder: that of the network.
        arm: the arm of the fine-tuning that starts from it; None: the arm that made the network, if it was fine-tuned.

    Raises:
        UserError: as `read_encoder_spec`.
    """
    description = read_encoder_description(folder)
    saved = description.get(WEIGHTS_ORIGIN_KEY)
    known = {key: text for key, text in saved.items() if isinstance(text, str)} if isinstance(saved, dict) else {}
    if recipe.encoder is None or not _comes_from_given(recipe, name, arm or description.get("arm")):
        return known
    source, licence = recipe.encoder.weights or "", recipe.encoder.licence
    if not known and not licence and source.startswith(TRACKED_PREFIXES):
        # An encoder of an earlier recipe, which began with fresh weights.
        return {}
    origin = {"source": name_weights(source, recipe.network_spec), **known}
    return {**origin, "licence": licence} if licence else origin


def trace_teacher(folder: Path, source: str) -> dict[str, str]:
    """Returns what is known of the weights of a saved teacher, which a recipe names as `source`."""
    description = read_encoder_description(folder)
    saved = description.get(WEIGHTS_ORIGIN_KEY)
    known = {key: text for key, text in saved.items() if isinstance(text, str)} if isinstance(saved, dict) else {}
    return {"source": name_weights(source, description["spec"]), **known}


def _comes_from_given(recipe: Recipe, name: str, arm: str | None) -> bool:
    """Returns True if the network of a stage comes from the weights that the recipe names."""
    if recipe.stages[name].makes_model and arm is not None and not is_pretrained_arm(arm):
        return arm == GIVEN_ARM
    source = recipe.encoder_source(name)
    if source is None or source.stage is None:
        return source is not None and source.is_given
    return _comes_from_given(recipe, source.stage, arm)


def check_whole_encoder(folder: Path, where: str | None = None) -> None:
    """Checks that a saved encoder has all layers of its spec: a fine-tuning may have taken some out of it.

    Raises:
        UserError: as `read_encoder_spec`; or it has not: the message begins with `where`, by default the folder.
    """
    lost = read_encoder_description(folder).get(LOST_LAYERS_KEY)
    if lost:
        raise UserError(
            f"{where or folder}: this encoder has lost layers in its fine-tuning ({', '.join(lost)}), and nothing else "
            "can start from it; valid: predictions of the whole model, or another encoder"
        )


def was_trained_on_all(folder: Path, store: str) -> bool:
    """Returns True if a saved encoder was trained on every image of the store with the hash `store`.

    Raises:
        UserError: as `read_encoder_spec`.
    """
    description = read_encoder_description(folder)
    return bool(description.get(TRAINED_ON_ALL_KEY)) and description.get("store") == store


def check_encoder_spec(folder: Path, spec: dict[str, Any], where: str) -> None:
    """Checks that a saved encoder has the spec of the recipe's encoder. Where that one has null, any value fits.

    Raises:
        UserError: the message names the first key that differs, with both values.
    """
    saved = json.loads(json.dumps(read_encoder_spec(folder)))
    wanted = json.loads(json.dumps(spec))
    wanted |= {key: saved[key] for key in ("mean", "std") if key in saved and wanted.get(key, 0) is None}
    # It changes how a gradient is computed, not the network.
    for one in (saved, wanted):
        one.pop("grad_checkpointing", None)
    for key in sorted(
        saved.keys() | wanted.keys(), key=lambda key: (key != "name", key)
    ):  # of another network all else differs too
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"encoder.{key}: {wanted.get(key)!r} differs from {saved.get(key)!r} of the encoder that {where} "
                f"names ({folder})"
            )


def load_encoder(folder: Path, image_size: int) -> Encoder:
    """Loads a saved encoder, for images of `image_size` pixels.

    Raises:
        UserError: as `read_encoder_spec`, or the weights do not fit the spec, or are not those of a network that works.
        ValueError: images of `image_size` are too small for the encoder.
    """
    spec, file = read_encoder_spec(folder), folder / ENCODER_WEIGHTS_FILE
    check_whole_encoder(folder)
    try:
        weights = load_tensors(file.read_bytes())
        check_finite_weights(weights)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{file}: is damaged: {one_line(error)}") from None
    try:
        check_spec_numbers(spec, weights)
    except ValueError as error:
        raise UserError(f"{folder / 'encoder.json'}: does not fit its weights: {error}") from None
    try:
        encoder = Encoder(spec, image_size)
    except (KeyError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
        problem = f"its spec is not one of an encoder here: {one_line(error)}"
        raise UserError(f"{folder / 'encoder.json'}: {problem}") from None
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{file}: does not fit its spec: {one_line(error)}") from None
    _check_maps(encoder, file)
    return encoder


@torch.no_grad()
def _check_maps(encoder: Encoder, file: Path) -> None:
    """Checks that the maps of two images of noise are finite: weights may be so large that their sums are not.

    Raises:
        UserError: names the file of the weights.
    """
    generator, size, was_training = torch.Generator().manual_seed(0), encoder.image_size, encoder.training
    maps = encoder.eval()(torch.rand(2, 3, size, size, generator=generator))
    encoder.train(was_training)
    if not all(bool(torch.isfinite(map_).all()) for map_ in maps):
        raise UserError(f"{file}: is damaged: the feature maps of an image of noise are not finite")


def check_untrusted_encoder(folder: Path, image_size: int) -> None:
    """Checks that the spec of an encoder is that of the network of its weights, without the memory of that network.

    For encoders that no recipe has the spec of.

    Raises:
        UserError: as `load_encoder`.
    """
    spec, weights = read_encoder_spec(folder), load_tensors((folder / ENCODER_WEIGHTS_FILE).read_bytes())
    try:
        check_spec_numbers(spec, weights)
        with torch.device("meta"):
            encoder = Encoder(spec, image_size)
        # A network of timm that was saved by an earlier version turns into what it was then.
        encoder.load_state_dict({name: tensor.to("meta") for name, tensor in weights.items()}, strict=False)
        skeleton = encoder.state_dict()
        if {name: tensor.shape for name, tensor in skeleton.items()} != {n: t.shape for n, t in weights.items()}:
            raise ValueError("its tensors have other names or shapes")
    except BUILD_ERRORS as error:
        raise UserError(f"{folder / 'encoder.json'}: does not fit its weights: {one_line(error)}") from None

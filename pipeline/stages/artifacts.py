"""Saved networks: a folder of safetensors and JSON files with a manifest, the same on disk and as an MLflow artifact or
logged model.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.train.checkpoint import DamagedFileError, read_verified, write_file, write_manifest
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.heads import Projection

Network = TypeVar("Network", bound=nn.Module)


def save_encoder(encoder: Encoder, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the spec and the weights of an encoder. `facts` (its method, its store, its seed) are kept with them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    description = {
        "format": 1,
        "spec": encoder.spec,
        "image_size": encoder.image_size,
        "shapes": encoder.shapes,
        **facts,
    }
    files = write_file(folder, "encoder.safetensors", save_tensors(weights))
    files |= write_file(folder, "encoder.json", json.dumps(description, indent=1).encode())
    write_manifest(folder, files)


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


def load_companion(folder: Path, what: str) -> nn.Module:
    """Loads the `head` or the `decoder` that was saved with an encoder.

    Raises:
        UserError: as `load_head`.
    """
    return load_head(folder) if what == "head" else load_decoder(folder)


def _load_network(folder: Path, cls: type[Network], what: str) -> Network:
    try:
        _, files = read_verified(folder)
        description = json.loads(files["network.json"])
        if description["class"] != cls.__name__:
            raise ValueError(f"network.json describes a {description['class']}")
        network = cls(**description["spec"])
        network.load_state_dict(load_tensors(files["network.safetensors"]))
    except (DamagedFileError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: is not a whole {what}: {str(error).splitlines()[0]}") from None
    return network


def read_encoder_spec(folder: Path) -> dict[str, Any]:
    """Returns the spec of a saved encoder, after its files were checked.

    Raises:
        UserError: a file is missing, damaged, or not an encoder's; the message names it.
    """
    try:
        _, files = read_verified(folder)
        return dict(json.loads(files["encoder.json"])["spec"])
    except (DamagedFileError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: is not a whole encoder: {error}") from None


def check_encoder_spec(folder: Path, spec: dict[str, Any], where: str) -> None:
    """Checks that a saved encoder has the spec of the recipe's encoder.

    Raises:
        UserError: the message names the first key that differs, with both values.
    """
    saved = json.loads(json.dumps(read_encoder_spec(folder)))
    wanted = json.loads(json.dumps(spec))
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
        UserError: as `read_encoder_spec`, or the weights do not fit the spec.
    """
    spec = read_encoder_spec(folder)
    try:
        encoder = Encoder(spec, image_size)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'encoder.json'}: its spec is not one of an encoder here: {error}") from None
    try:
        encoder.load_state_dict(load_tensors((folder / "encoder.safetensors").read_bytes()))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(
            f"{folder / 'encoder.safetensors'}: does not fit its spec: {str(error).splitlines()[0]}"
        ) from None
    return encoder

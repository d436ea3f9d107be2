"""Saved encoders: a folder of safetensors and JSON files with a manifest, the same on disk and as an MLflow artifact or
logged model.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.stages.artifacts.artifact_files import write_artifact_files
from firstlight.pipeline.stages.artifacts.encoder_description import check_whole_encoder, read_encoder_spec
from firstlight.pipeline.stages.artifacts.weight_checks import BUILD_ERRORS, check_finite_weights, check_spec_numbers
from firstlight.pipeline.train.folder_manifest import write_manifest
from firstlight.tasks.nn.encoders import Encoder

ENCODER_WEIGHTS_FILE = "encoder.safetensors"


def save_encoder(encoder: Encoder, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the spec and the weights of an encoder. `facts` (its method, its store, its seed) are kept with them."""
    write_manifest(folder, write_encoder_files(encoder, folder, facts))


def write_encoder_files(encoder: Encoder, folder: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Writes the files of an encoder into a folder that gets a manifest later. Returns their entries of it."""
    description = {
        "format": 1,
        "spec": encoder.spec,
        "image_size": encoder.image_size,
        "shapes": encoder.shapes,
        **facts,
    }
    return write_artifact_files(folder, "encoder", encoder.state_dict(), description)


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
    maps = encoder.eval()(torch.rand(2, encoder.image_channels, size, size, generator=generator))
    encoder.train(was_training)
    if not all(bool(torch.isfinite(map_).all()) for map_ in maps):
        raise UserError(f"{file}: is damaged: the feature maps of an image of noise are not finite")


def check_untrusted_encoder(folder: Path, image_size: int) -> None:
    """Checks that the spec of an encoder is that of the network of its weights, without the memory of that network.

    It is for encoders that no recipe has the spec of.

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

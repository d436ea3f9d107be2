"""Networks and tables that are saved with an encoder: a head, a decoder, a memory bank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load as load_tensors
from torch import nn

from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.stages.artifacts.artifact_files import write_artifact_files
from firstlight.pipeline.stages.artifacts.table_folder import SavedTable, load_table
from firstlight.pipeline.stages.artifacts.weight_checks import BUILD_ERRORS, check_finite_weights, check_spec_numbers
from firstlight.pipeline.train.folder_manifest import DamagedFileError, read_verified, write_manifest
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.heads import Projection

# The name of the frozen network that a pretraining learns from: among the companions of an instance, and of the facts
# of the encoder that has learned from it, as of its weights.
TEACHER = "teacher"
Network = TypeVar("Network", bound=nn.Module)


def save_network(network: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    """Writes a network that a method makes besides the encoder: `network.spec`, its constructor's keyword arguments,
    and its weights.
    """
    description = {"format": 1, "class": type(network).__name__, "spec": network.spec, **facts}
    write_manifest(folder, write_artifact_files(folder, "network", network.state_dict(), description))


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

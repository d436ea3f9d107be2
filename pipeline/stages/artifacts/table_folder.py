"""Saved tables of the values that a method has kept of its images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from firstlight.pipeline.errors import UserError, take_first_line
from firstlight.pipeline.stages.artifacts.artifact_files import write_artifact_files
from firstlight.pipeline.stages.artifacts.weight_checks import check_finite_weights
from firstlight.pipeline.train.folder_manifest import DamagedFileError, read_verified, write_manifest


@dataclass(frozen=True)
class SavedTable:
    """A value for each image that a method was trained on."""

    ids: np.ndarray  # (n,) int64, ascending
    values: Tensor  # (n, ...)
    store: str  # the hash of the store of these images


def save_table(table: SavedTable, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the values that a method has kept of its images. `facts` are kept with them."""
    tensors = {"ids": torch.from_numpy(table.ids.copy()), "values": table.values}
    description = {"format": 1, "shape": list(table.values.shape), **facts, "store": table.store}
    write_manifest(folder, write_artifact_files(folder, "table", tensors, description))


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
        raise UserError(f"{folder}: is not a whole table: {take_first_line(error)}") from None

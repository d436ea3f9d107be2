"""Small saved encoders, and ways to damage them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from firstlight.pipeline.train.folder_manifest import write_file, write_manifest
from firstlight.tasks.nn.encoders import Encoder

SMALL_SPEC: dict[str, Any] = {
    "name": "convnet",
    "norm": "sync",
    "width": 4,
    "depth": 2,
    "input": "sobel",
    "mean": (0.1, 0.2, 0.3),
}
ENCODER_FILES = ["encoder.json", "encoder.safetensors", "manifest.json"]


def make_small_encoder(seed: int = 0, **changes: Any) -> Encoder:
    """Returns a small encoder whose statistics are not the initial ones."""
    torch.manual_seed(seed)
    made = Encoder({**SMALL_SPEC, **changes}, 8)
    made(torch.rand(4, 3, 8, 8))
    return made


def flip_middle_bit(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# Ways to damage a file, by name.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" x"),
    "flipped": flip_middle_bit,
}


def reseal_encoder(folder: Path, weights: bytes | None, **spec: Any) -> None:
    """Seals an encoder again, with other weights or with changes of its spec."""
    told = json.loads((folder / "encoder.json").read_text())
    files = write_file(folder, "encoder.json", json.dumps({**told, "spec": {**told["spec"], **spec}}).encode())
    if weights is not None:
        files |= write_file(folder, "encoder.safetensors", weights)
    write_manifest(folder, files)


def rewrite_encoder(folder: Path, weights: Any = None, **description: Any) -> None:
    """Replaces weights, or keys of the description, with sums that are right."""
    told = {**json.loads((folder / "encoder.json").read_text()), **description}
    data = save(weights) if weights is not None else (folder / "encoder.safetensors").read_bytes()
    files = write_file(folder, "encoder.safetensors", data)
    write_manifest(folder, files | write_file(folder, "encoder.json", json.dumps(told).encode()))

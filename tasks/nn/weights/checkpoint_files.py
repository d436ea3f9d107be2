"""Files of weights: safetensors, and checkpoints of torch read by its restricted unpickler. Nothing in them is run.

`torch.load(weights_only=True)` knows tensors, containers, numbers and strings, and refuses every other name of a pickle
before it is imported. The only other name that it gets here is `argparse.Namespace`, which training scripts keep their
options in and which holds values only. Its checks leave memory out: what a file declares is held against its own size.
"""

import argparse
import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
MAX_FILE_BYTES = 64 * 2**30
# The parts of a checkpoint that hold a network, by preference: averaged weights and teachers before others.
PART_NAMES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder"),
    *("state_dict", "model_state_dict", "model", "network", "net", "module", "student", "encoder", "backbone"),
)
MAX_PART_DEPTH = 4
DENSE_KINDS = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class StateDictFile:
    """The tensors of one network in a file."""

    # The tensors by name, as the file has them. They may lie in the file: copy what is kept.
    tensors: Mapping[str, Tensor]
    # The part of the file that they are, `teacher` or `model.state_dict`; "" if the file is one state dict.
    part: str
    # Parts that may hold another network.
    other_parts: tuple[str, ...]
    # Texts beside the tensors of a safetensors file.
    notes: Mapping[str, str]
    sha256: str


def read_state_dict(path: Path, part: str | None = None) -> StateDictFile:
    """Reads the tensors of a network from a file, without running anything that it holds.

    Args:
        path: `.safetensors`, or a checkpoint of torch: `.pth`, `.pt`, `.bin`, `.ckpt` or `.pth.tar`.
        part: the part to take, as `StateDictFile.part` names it. None takes the first of `PART_NAMES` that is there.

    Raises:
        ValueError: the file is missing, damaged, too large, or holds something besides weights; in one line.
    """
    name = str(path)
    if not name.endswith((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)):
        valid = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
        raise ValueError(f"{name!r} is not a file of weights, by its name; valid: names that end with {valid}")
    try:
        size = path.stat().st_size
        digest = _compute_sha256(path) if 0 < size <= MAX_FILE_BYTES else ""
    except OSError as error:
        raise ValueError(f"{name!r} cannot be read: {error.strerror or error}") from None
    if not digest:
        raise ValueError(f"{name!r} has {size} bytes; valid: 1 to {MAX_FILE_BYTES}")
    if name.endswith(SAFETENSORS_SUFFIX):
        content, notes = _read_safetensors(path)
    else:
        content, notes = _read_checkpoint(path, size), {}
    tensors, found, others = _select_part(content, part, name)
    _check_dense(tensors, size, name)
    return StateDictFile(tensors, found, others, notes, digest)


def _compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {_shorten_error(error)}") from None


def _read_checkpoint(path: Path, size: int) -> Any:
    """Returns what torch's restricted unpickler makes of a checkpoint.

    Raises:
        ValueError: it refuses the file, or the file declares more than it holds.
    """
    name = str(path)
    try:
        is_archive = _check_archive(path, size)
        # An archive is mapped: its tensors are parts of the file, and none can be larger than it.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    # A broken file fails in its own way.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)|unrecognized function (\S+)", str(error))
        if refused:
            what = refused[1] or refused[2]
            raise ValueError(
                f"{name!r} holds {what!r}, which is not a weight, and was not run; valid: a state dict, best as "
                "safetensors"
            ) from None
        raise ValueError(f"{name!r} is not a whole checkpoint of torch: {_shorten_error(error)}") from None


def _check_archive(path: Path, size: int) -> bool:
    """Returns True if a checkpoint is a zip archive, as torch writes them since version 1.6.

    Raises:
        ValueError: the members are compressed, or larger together than the archive.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, and torch compresses none")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its members are larger than the file")
    return True


def _select_part(content: Any, part: str | None, name: str) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Returns the tensors of the part that holds the network, its name, and the names of other parts."""
    taken: list[str] = []
    others: list[str] = []
    wanted = part.split(".") if part else []
    while isinstance(content, Mapping) and len(taken) <= MAX_PART_DEPTH:
        parts = list(_find_parts(content))
        if part is None and not parts:
            break
        if part is not None and len(taken) == len(wanted):
            break
        if part is not None and not isinstance(content.get(wanted[len(taken)]), Mapping):
            raise ValueError(f"{name!r} has no part {part!r}; valid: {', '.join(map(repr, parts)) or 'none'}")
        chosen = wanted[len(taken)] if part is not None else parts[0]
        others += [".".join((*taken, other)) for other in parts if other != chosen]
        taken.append(chosen)
        content = content[chosen]
    if not isinstance(content, Mapping):
        raise ValueError(f"{name!r} holds a {type(content).__name__}, not a state dict: tensors by name")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        held = ", ".join(repr(key) for key in list(content)[:5])
        raise ValueError(f"{name!r} holds no tensors by name, but {held or 'nothing'}")
    return tensors, ".".join(taken), tuple(others)


def _find_parts(content: Mapping[Any, Any]) -> Iterator[str]:
    """Yields the names of the parts of a checkpoint that hold tensors, or parts that do, by preference."""
    parts = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Mapping) and _holds_tensors(value)
    }
    yield from (name for name in PART_NAMES if name in parts)
    has_tensors = any(isinstance(value, Tensor) for value in content.values())
    # A single part of any name is the network, unless its tensors are those beside it.
    if not has_tensors and len(parts) == 1 and not parts.keys() & set(PART_NAMES):
        yield from parts


def _holds_tensors(content: Any, depth: int = 0) -> bool:
    if depth >= MAX_PART_DEPTH or not isinstance(content, Mapping):
        return False
    values = list(content.values())
    return any(isinstance(value, Tensor) for value in values) or any(_holds_tensors(v, depth + 1) for v in values)


def _check_dense(tensors: Mapping[str, Tensor], size: int, name: str) -> None:
    """Raises ValueError if a tensor is not a plain one on the CPU, or is larger than the file that it comes from."""
    for key, tensor in tensors.items():
        if type(tensor) not in DENSE_KINDS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{name!r} holds {key!r}, which is no dense tensor")
        if tensor.is_quantized or tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"{name!r} holds {key!r}, which is quantized, or larger than the file")


def _shorten_error(error: Exception) -> str:
    """Returns the line of an error's message that says why, without characters that a terminal obeys."""
    # The reason follows torch's text about its own switch, which is not ours to change.
    message = str(error).rpartition("WeightsUnpickler error:")[2]
    line = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
    return "".join(c if c.isprintable() else "?" for c in line)[:200]

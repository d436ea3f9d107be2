"""Checkpoints: safetensors and JSON, with a manifest of sizes and sha256 that is written last. Pickle is never used.

A checkpoint is a folder `step-<step>-<attempt>`. It counts once its manifest exists: files are flushed to the disk
first, and the manifest arrives by an atomic rename. A folder without a manifest was left by a killed worker; it is
ignored, and the next save deletes it.

    shared.json, shared.safetensors      model, optimiser, schedule: rank 0
    shard-00000-of-00002.safetensors     rows of the tables: every rank its own; readable by any number of workers
    manifest.json                        {"step", "files": {name: {"bytes", "sha256"}}, ...}
"""

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.errors import StopTraining, one_line
from firstlight.pipeline.files import write_flushed, write_json
from firstlight.tasks.collective import broadcast_object, gather_objects, rank, world_size

FOLDER_MANIFEST = "manifest.json"


class DamagedFileError(ValueError):
    """A file differs from its manifest or violates its format. The text names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read. `shards` has, for each rank that wrote one, the state of each table by name."""

    step: int
    shared: dict[str, Any]
    shards: list[dict[str, dict[str, Tensor]]]
    meta: dict[str, Any]


def pack_state(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Converts nested dicts, lists, numbers and tensors to a JSON value, and adds the tensors to `tensors` by path.

    Raises:
        TypeError: a value has another type; the text names its path.
    """
    if isinstance(value, Tensor):
        # Cloned, because safetensors refuses memory that two tensors share.
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(value, dict):
        return {"$dict": [[key, pack_state(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack_state(item, tensors, f"{path}/{k}") for k, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be kept in a checkpoint")


def unpack_state(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverts `pack_state`."""
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]]
    if isinstance(value, dict):
        return {key: unpack_state(item, tensors) for key, item in value["$dict"]}
    return [unpack_state(item, tensors) for item in value] if isinstance(value, list) else value


def write_manifest(folder: Path, files: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Writes the manifest of a folder, which makes the folder count."""
    write_json(folder / FOLDER_MANIFEST, {**facts, "files": files})


def write_file(folder: Path, name: str, data: bytes) -> dict[str, dict[str, Any]]:
    """Writes one file of a folder that gets a manifest later. Returns its entry of the manifest."""
    write_flushed(folder / name, data)
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def read_verified(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the manifest of a folder, and the bytes of its files by name.

    Raises:
        DamagedFileError: a file is missing, cut short or changed; names the first one.
    """
    try:
        manifest = json.loads((folder / FOLDER_MANIFEST).read_bytes())
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{folder / FOLDER_MANIFEST}: is not a manifest ({type(error).__name__})") from None
    files = {}
    for name, (size, sha256) in listed.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DamagedFileError(f"{path}: is missing")
        files[name] = path.read_bytes()
        if len(files[name]) != size:
            raise DamagedFileError(f"{path}: has {len(files[name])} bytes, its manifest says {size}")
        if hashlib.sha256(files[name]).hexdigest() != sha256:
            raise DamagedFileError(f"{path}: its sha256 is not the one in its manifest")
    return manifest, files


class Checkpoints:
    """The checkpoints of one training, in a folder that all workers see. All methods are collective."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self, step: int, shared: dict[str, Any], shard: dict[str, dict[str, Tensor]], meta: dict[str, Any]
    ) -> None:
        """Writes a checkpoint. Once this returns, the checkpoint is durable.

        Raises:
            StopTraining: on all ranks: a file cannot be written, for example to a full disk; names the folder.
        """
        target = self.folder / broadcast_object(f"step-{step:09d}-{uuid.uuid4().hex[:8]}")
        files, problem = {}, None
        try:
            target.mkdir(parents=True, exist_ok=True)
            files = self._write_files(target, shared, shard)
        except OSError as error:
            problem = f"{target}: the checkpoint of step {step} cannot be written: {error.strerror or error}"
        answers = gather_objects((files, problem))
        problem = next((p for _, p in answers if p), None)
        if problem is None and rank() == 0:
            try:
                write_manifest(
                    target,
                    {k: v for part, _ in answers for k, v in part.items()},
                    step=step,
                    world=world_size(),
                    **meta,
                )
            except OSError as error:
                problem = f"{target}: the checkpoint of step {step} cannot be written: {error.strerror or error}"
        problem = broadcast_object(problem)
        if rank() == 0:
            self._delete_old(target, failed=problem is not None)
        if problem:
            raise StopTraining(f"{problem}; earlier checkpoints are intact, run again to continue")

    def _write_files(self, target: Path, shared: dict[str, Any], shard: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        rows: dict[str, Tensor] = {
            f"{name}/{key}": t.contiguous() for name, state in shard.items() for key, t in state.items()
        }
        files = write_file(target, f"shard-{rank():05d}-of-{world_size():05d}.safetensors", save_tensors(rows))
        if rank() == 0:
            tensors: dict[str, Tensor] = {}
            layout = pack_state(shared, tensors)
            files |= write_file(target, "shared.json", json.dumps(layout).encode())
            files |= write_file(target, "shared.safetensors", save_tensors(tensors))
        return files

    def _delete_old(self, newest: Path, failed: bool) -> None:
        """Deletes the leftovers of killed and failed saves, and all but the `keep` newest checkpoints."""
        if failed:
            shutil.rmtree(newest, ignore_errors=True)
            return
        sealed = sorted(p for p in self.folder.glob("step-*") if (p / FOLDER_MANIFEST).exists())
        for old in {*self.folder.glob("step-*")} - {*sealed[-self.keep :], newest}:
            # The manifest goes first: a half-deleted checkpoint must not count.
            (old / FOLDER_MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)

    def read_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Returns the newest intact checkpoint, None if none was written, and a line for each damaged one.

        Raises:
            StopTraining: every checkpoint is damaged; to start over silently would lose the training.
        """
        chosen, complaints = broadcast_object(self._choose_newest() if rank() == 0 else None)
        if chosen is None and complaints:
            raise StopTraining(
                f"{'; '.join(complaints)}; no whole checkpoint is left: "
                f"delete {self.folder} to train from the beginning"
            )
        return (self._read_checkpoint(self.folder / chosen) if chosen else None), complaints

    def _choose_newest(self) -> tuple[str | None, list[str]]:
        complaints: list[str] = []
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            if not (folder / FOLDER_MANIFEST).exists():
                continue
            try:
                self._read_checkpoint(folder)
                return folder.name, complaints
            except DamagedFileError as error:
                complaints.append(str(error))
        return None, complaints

    def _read_checkpoint(self, folder: Path) -> Checkpoint:
        manifest, files = read_verified(folder)
        try:
            shared = unpack_state(json.loads(files["shared.json"]), load_tensors(files["shared.safetensors"]))
            shards = [
                _group_by_table(load_tensors(data)) for name, data in sorted(files.items()) if name.startswith("shard-")
            ]
            if len(shards) != manifest["world"]:
                raise DamagedFileError(f"{folder}: has {len(shards)} of {manifest['world']} shards")
            return Checkpoint(int(manifest["step"]), shared, shards, manifest)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DamagedFileError(f"{folder}: {type(error).__name__}: {one_line(error)}") from None


def _group_by_table(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    tables: dict[str, dict[str, Tensor]] = {}
    # Sorted, because safetensors returns them in an order of its own.
    for path, tensor in sorted(tensors.items()):
        name, key = path.rsplit("/", 1)
        tables.setdefault(name, {})[key] = tensor
    return tables

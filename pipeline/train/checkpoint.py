"""Checkpoints: safetensors and JSON, with a manifest of sizes and sha256 that is written last. Pickle is never used.

A checkpoint is a folder `step-<step>-<attempt>`. It counts once its manifest exists: files are flushed to the disk
first, and the manifest arrives by an atomic rename. A folder without a manifest was left by a killed worker; it is
ignored, and the next save deletes it. The manifest has a sum of itself, and its step is that of the folder's name.

In a storage that is a bucket, each rank uploads what it wrote, then rank 0 the manifest and the record that makes the
checkpoint whole there. A machine downloads what it lacks before it reads.

    shared.json, shared.safetensors      model, optimiser, schedule: rank 0
    shard-00000-of-00002.safetensors     rows of the tables: every rank its own; readable by any number of workers
    manifest.json                        {"step", "world", "files": {name: {"bytes", "sha256"}}, ..., "sum"}
"""

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.data.mirror.bucket import FileSum
from firstlight.pipeline.data.mirror.contents import CONTENTS_FILE
from firstlight.pipeline.data.mirror.mirror import Mirror
from firstlight.pipeline.data.mirror.places import explain_outage, find_mirror, find_unit
from firstlight.pipeline.errors import StopTraining, describe_os_error, one_line
from firstlight.pipeline.records import Count, DamagedRecord, RecordShape, check_shape
from firstlight.pipeline.train import watchdog
from firstlight.pipeline.train.folder_manifest import (
    FOLDER_MANIFEST,
    DamagedFileError,
    read_verified,
    write_file,
    write_manifest,
)
from firstlight.tasks.collective import broadcast_object, gather_objects, rank, world_size

# The folder of a checkpoint. Other files and folders beside it are left alone.
CHECKPOINT_NAME = re.compile(r"step-(\d{9,})-[0-9a-f]+\Z")
SHARED_LAYOUT_FILE, SHARED_TENSORS_FILE = "shared.json", "shared.safetensors"
OTHER_STATE_ADVICE = "delete the folder to train from the checkpoint before it"
# Exceptions of the readers of a checkpoint's files, which are whole and have another content than expected.
CONTENT_ERRORS = (SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError)


class _CheckpointManifest(RecordShape):
    """The entries of a checkpoint's manifest besides its files."""

    step: Count
    world: Annotated[int, Field(ge=1, le=2**20)]


CHECKPOINT_SHAPE = TypeAdapter(_CheckpointManifest)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read. `shards` has, for each rank that wrote one, the state of each table by name."""

    folder: Path
    step: int
    shared: dict[str, Any]
    shards: list[dict[str, dict[str, Tensor]]]
    meta: dict[str, Any]


def pack_state(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Converts nested dicts, lists, numbers, dtypes and tensors to JSON, and adds the tensors to `tensors` by path.

    Raises:
        TypeError: a value has another type; the text names its path.
    """
    if isinstance(value, Tensor):
        # The tensor is cloned, because safetensors refuses memory that two tensors share.
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(value, dict):
        return {"$dict": [[key, pack_state(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack_state(item, tensors, f"{path}/{k}") for k, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    raise TypeError(f"{path}: a {type(value).__name__} cannot be kept in a checkpoint")


def unpack_state(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverts `pack_state`."""
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]]
    if isinstance(value, dict) and "$dtype" in value:
        return _read_dtype(value["$dtype"])
    if isinstance(value, dict):
        return {key: unpack_state(item, tensors) for key, item in value["$dict"]}
    return [unpack_state(item, tensors) for item in value] if isinstance(value, list) else value


def _read_dtype(name: str) -> torch.dtype:
    """Returns the dtype of torch with this name. Raises ValueError if there is none."""
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def list_checkpoint_folders(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints in `folder`, whole or not, in the order of their steps."""
    return [path for path in _order_folders(folder.glob("step-*")) if path.is_dir() and not path.is_symlink()]


def _order_folders(folders: Iterable[Path]) -> list[Path]:
    """Returns those of some folders that are named like checkpoints, in the order of their steps."""
    found = [(match, path) for path in folders if (match := CHECKPOINT_NAME.match(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), pair[1].name))]


class Checkpoints:
    """The checkpoints of one training, in a folder that all workers see. All methods are collective."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.has_saved = False

    def save(
        self, step: int, shared: dict[str, Any], shard: dict[str, dict[str, Tensor]], meta: dict[str, Any]
    ) -> list[str]:
        """Writes a checkpoint. Once this returns, the checkpoint is durable.

        Returns lines for the user: that it could not be uploaded, so that it exists on these machines only.

        Raises:
            StopTraining: on all ranks: a file cannot be written, for example to a full disk; names the folder.
        """
        target = self.folder / broadcast_object(f"step-{step:09d}-{uuid.uuid4().hex[:8]}")
        files, problem = {}, None
        try:
            # A folder that has disappeared since is not made again: what was in it is lost, and the user should know.
            target.mkdir(parents=not self.has_saved, exist_ok=True)
            files = self._write_files(target, shared, shard)
            self.has_saved = True
        except OSError as error:
            problem = f"{target}: the checkpoint of step {step} cannot be written: {describe_os_error(error)}"
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
                problem = f"{target}: the checkpoint of step {step} cannot be written: {describe_os_error(error)}"
        problem = broadcast_object(problem)
        if rank() == 0:
            self._delete_old(target, failed=problem is not None)
        if problem:
            raise StopTraining(f"{problem}; earlier checkpoints are intact, run again to continue")
        mirror = find_mirror(self.folder)
        return [] if mirror is None else self._upload(mirror, target, list(files))

    def _upload(self, mirror: Mirror, target: Path, names: list[str]) -> list[str]:
        """Uploads a checkpoint, and the logs up to it. Returns a line if it fails. It is collective."""
        # An upload may take longer than a step may.
        watchdog.suspend_timer()
        sent: dict[str, FileSum] = {}
        problem = mirror.attempt(lambda: sent.update({name: mirror.send_file(target, name) for name in names}))
        answers = gather_objects((sent, problem))
        problem = next((p for _, p in answers if p), None)
        if problem is None and rank() == 0:
            problem = mirror.attempt(
                lambda: self._seal_upload(mirror, target, {k: v for part, _ in answers for k, v in part.items()})
            )
        kept, problem = broadcast_object(([path.name for path in list_checkpoint_folders(self.folder)], problem))
        if rank() != 0:
            # Nobody else removes them on another machine.
            for old in list_checkpoint_folders(self.folder):
                if old.name not in kept:
                    shutil.rmtree(old, ignore_errors=True)
        return [f"{mirror.get_location(target)}: is not uploaded: {problem}; the training goes on"] if problem else []

    def _seal_upload(self, mirror: Mirror, target: Path, files: dict[str, FileSum]) -> None:
        # A training that continues elsewhere would have no curves so far without its logs.
        mirror.push(find_unit(self.folder))
        mirror.seal(target, {**files, FOLDER_MANIFEST: mirror.send_file(target, FOLDER_MANIFEST)})
        names = [Path(name) for name in mirror.list_files(self.folder)]
        begun = _order_folders({self.folder / name.parts[0] for name in names})
        whole = _order_folders({self.folder / name.parts[0] for name in names if name.name == CONTENTS_FILE})
        for old in {*begun} - {*whole[-self.keep :], target}:
            mirror.remove(old)

    def _write_files(self, target: Path, shared: dict[str, Any], shard: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        rows: dict[str, Tensor] = {
            f"{name}/{key}": t.contiguous() for name, state in shard.items() for key, t in state.items()
        }
        files = write_file(target, name_shard_file(rank(), world_size()), save_tensors(rows))
        if rank() == 0:
            tensors: dict[str, Tensor] = {}
            layout = pack_state(shared, tensors)
            files |= write_file(target, SHARED_LAYOUT_FILE, json.dumps(layout).encode())
            files |= write_file(target, SHARED_TENSORS_FILE, save_tensors(tensors))
        return files

    def _delete_old(self, newest: Path, failed: bool) -> None:
        """Deletes the leftovers of killed and failed saves, and all but the `keep` newest checkpoints."""
        if failed:
            shutil.rmtree(newest, ignore_errors=True)
            return
        begun = list_checkpoint_folders(self.folder)
        sealed = [path for path in begun if (path / FOLDER_MANIFEST).exists()]
        for old in {*begun} - {*sealed[-self.keep :], newest}:
            # The manifest goes first: a half-deleted checkpoint must not count.
            (old / FOLDER_MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)

    def read_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Returns the newest intact checkpoint, None if none was written, and a line for each damaged one.

        Raises:
            StopTraining: every checkpoint is damaged; to start over silently would lose the training.
        """
        mirror = find_mirror(self.folder)
        if mirror is not None:
            found, damage = self._download_newest(mirror)
        else:
            chosen, damage = broadcast_object(self._choose_newest() if rank() == 0 else None)
            found = self._read_checkpoint(self.folder / chosen) if chosen else None
        if found is None and damage:
            where = self.folder if mirror is None else f"{mirror.get_location(self.folder)} and {self.folder}"
            raise StopTraining(
                f"{'; '.join(damage)}; no whole checkpoint is left: delete {where} to train from the beginning"
            )
        return found, damage

    def _download_newest(self, mirror: Mirror) -> tuple[Checkpoint | None, list[str]]:
        """Returns as `read_newest` the newest checkpoint that all ranks have, or can download. It is collective."""
        candidates, damage = broadcast_object(self._list_candidates(mirror) if rank() == 0 else None)
        for name in candidates:
            found, problem = self._obtain(mirror, self.folder / name)
            problems = [line for line in gather_objects(problem) if line]
            if not problems:
                return found, damage
            damage.append(problems[0])
        return None, damage

    def _list_candidates(self, mirror: Mirror) -> tuple[list[str], list[str]]:
        """Returns the names of the whole checkpoints here and in the bucket, newest first."""
        found = {path for path in list_checkpoint_folders(self.folder) if (path / FOLDER_MANIFEST).exists()}
        problem = mirror.attempt(
            lambda: found.update(path for path in mirror.list_units(self.folder) if path.parent == self.folder),
            force=not found,
        )
        if problem and not found:
            raise StopTraining(explain_outage(mirror, OSError(5, problem)))
        return [path.name for path in reversed(_order_folders(found))], []

    def _obtain(self, mirror: Mirror, folder: Path) -> tuple[Checkpoint | None, str | None]:
        """Returns a checkpoint after a download of what this machine lacks, or one line about why it cannot be read."""
        try:
            # The files on this machine may be enough if nothing can be downloaded.
            mirror.attempt(lambda: mirror.fetch(folder))
            return self._read_checkpoint(folder), None
        except (DamagedRecord, DamagedFileError) as error:
            return None, str(error)

    def _choose_newest(self) -> tuple[str | None, list[str]]:
        damage: list[str] = []
        for folder in reversed(list_checkpoint_folders(self.folder)):
            if not (folder / FOLDER_MANIFEST).exists():
                continue
            try:
                self._read_checkpoint(folder)
                return folder.name, damage
            except DamagedFileError as error:
                damage.append(str(error))
        return None, damage

    def _read_checkpoint(self, folder: Path) -> Checkpoint:
        manifest, files = read_verified(folder)
        _check_checkpoint(folder, manifest)
        try:
            shared = unpack_state(json.loads(files[SHARED_LAYOUT_FILE]), load_tensors(files[SHARED_TENSORS_FILE]))
            if not isinstance(shared, dict):
                raise TypeError(f"{SHARED_LAYOUT_FILE} holds a {type(shared).__name__}")
            names = [name_shard_file(rank_, manifest["world"]) for rank_ in range(manifest["world"])]
            shards = [_group_by_table(load_tensors(files[name])) for name in names]
        except CONTENT_ERRORS as error:
            raise DamagedFileError(f"{folder}: {type(error).__name__}: {one_line(error)}") from None
        return Checkpoint(folder, manifest["step"], shared, shards, manifest)


def name_shard_file(rank_: int, world: int) -> str:
    """Returns the name of the file with the rows that a rank of `world` ranks keeps."""
    return f"shard-{rank_:05d}-of-{world:05d}.safetensors"


def _check_checkpoint(folder: Path, manifest: dict[str, Any]) -> None:
    """Checks the numbers of a checkpoint's manifest against the folder and its files."""
    file = folder / FOLDER_MANIFEST
    try:
        check_shape(manifest, CHECKPOINT_SHAPE, str(file))
    except DamagedRecord as error:
        raise DamagedFileError(str(error)) from None
    name = CHECKPOINT_NAME.match(folder.name)
    if name and int(name[1]) != manifest["step"]:
        raise DamagedFileError(f"{file}: is damaged: it says step {manifest['step']}, its folder {int(name[1])}")
    shards = sum(listed.startswith("shard-") for listed in manifest["files"])
    if shards != manifest["world"]:
        raise DamagedFileError(f"{folder}: has {shards} of {manifest['world']} shards")


@contextlib.contextmanager
def refuse_other_state(checkpoint: Checkpoint) -> Iterator[None]:
    """Names the checkpoint in the errors of the block, which loads its state.

    Raises:
        StopTraining: the files are whole, and hold the state of something else.
    """
    try:
        yield
    except CONTENT_ERRORS as error:
        problem = f"is no checkpoint of this training ({type(error).__name__}: {one_line(error)})"
        raise StopTraining(f"{checkpoint.folder}: {problem}; {OTHER_STATE_ADVICE}") from None


def _group_by_table(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    tables: dict[str, dict[str, Tensor]] = {}
    # The tensors are sorted, because safetensors returns them in an order of its own.
    for path, tensor in sorted(tensors.items()):
        name, key = path.rsplit("/", 1)
        tables.setdefault(name, {})[key] = tensor
    return tables

"""Work that several stages of a recipe would repeat bit for bit, such as a fine-tuning from scratch beside each of ten
pretrainings. It is done once: a file names the folder in which it was done, by a hash of all that decides it.
"""

import hashlib
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from firstlight.pipeline.records import DamagedRecord, RecordShape, read_json_record, write_sealed_json
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.tasks.collective import broadcast_object, rank

# The folder of these files, beside those of the stages.
SHARED_FOLDER = "shared"
# The facts that decide an instance's result through the encoder and other networks that it starts from.
STARTING_FACTS = frozenset({"from", "given", "head", "decoder", "bank", "teacher"})


class _SharedShape(RecordShape):
    """The folder in which a piece of work was done, relative to that of the recipe's run."""

    folder: str


SHARED_SHAPE = TypeAdapter(_SharedShape)


def list_shared_facts(instance: StageInstance, own_keys: Set[str]) -> dict[str, Any]:
    """Returns what decides an instance's result, without the networks that it starts from and the keys `own_keys`
    of its section.
    """
    facts = {name: value for name, value in instance.facts.items() if name not in STARTING_FACTS}
    if "stage" in facts:
        facts["stage"] = {key: value for key, value in facts["stage"].items() if key not in own_keys}
    return facts


def find_shared_folder(instance: StageInstance, key: str) -> Path | None:
    """Returns the folder in which the work of the hash `key` was done, None if there is none. It is collective."""
    found: Path | None = broadcast_object(_read_folder(instance, key) if rank() == 0 and instance.facts else None)
    return found


def _read_folder(instance: StageInstance, key: str) -> Path | None:
    run = instance.folder.parent
    try:
        found = read_json_record(run / SHARED_FOLDER / f"{key}.json", SHARED_SHAPE)
    except DamagedRecord:
        # The work is done again, and the file written anew.
        return None
    if found is None or ".." in Path(found["folder"]).parts:
        return None
    folder = run / found["folder"]
    return folder if folder.is_dir() and folder.is_relative_to(run) else None


def share_folder(instance: StageInstance, key: str, folder: Path) -> None:
    """Says that the work of the hash `key` was done in `folder`, which lies in the folder of the instance."""
    if rank() == 0 and instance.facts:
        run = instance.folder.parent
        (run / SHARED_FOLDER).mkdir(exist_ok=True)
        write_sealed_json(run / SHARED_FOLDER / f"{key}.json", {"folder": str(folder.relative_to(run))})


def hash_weights(network: nn.Module) -> str:
    """Returns a sha256 over every bit of a network's weights and buffers, which are equal on all workers.

    Buffers that are not saved with the weights count, such as the colours that an encoder subtracts.
    """
    found = hashlib.sha256()
    for name, value in sorted([*network.named_parameters(), *network.named_buffers()]):
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

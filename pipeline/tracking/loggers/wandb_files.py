"""The files that W&B writes on disk: a log of records, of which the numbers and images are read back.

A file is a log of LevelDB behind a header of 7 bytes: blocks of 32 KiB, which hold records of the protobuf type that
the package `wandb` has.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The metric that is the axis of all others, by the name that it has in Lightning's logger
STEP_KEY = "trainer/global_step"
FILE_HEADER = struct.Struct("<4sHB")
FILE_MAGIC = (b":W&B", 0xBEE1, 0)
RECORD_HEADER = struct.Struct("<IHB")
BLOCK_BYTES = 32768
# Kinds of parts of a record: all of it, or its first part, one in between, its last one
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

# Texts that stand for numbers
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass
class WandbLogs:
    """Contents of a run's logs: numbers (key, step, value), images (name, sha256), and rows, by W&B's own count."""

    numbers: list[tuple[str, int, float]] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)
    num_rows: int = 0


def read_wandb_logs(folder: Path, run_id: str) -> WandbLogs:
    """Returns what the logs of a run below `folder` hold, in the order in which they were begun."""
    found = WandbLogs()
    files = (folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    for file in sorted(files, key=lambda file: file.parent.name.removeprefix("offline-")):
        for record in iterate_wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                _add_row(found, read_history(record))
    return found


def read_history(record: Any) -> dict[str, Any]:
    """Returns a row of a run: its values by key. An image is a dictionary, whose entries W&B writes one by one."""
    row: dict[str, Any] = {}
    for item in record.history.item:
        path = list(item.nested_key) or [item.key]
        place = row
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = json.loads(item.value_json)
    return row


def _add_row(found: WandbLogs, row: dict[str, Any]) -> None:
    found.num_rows = max(found.num_rows, int(row.get("_step", 0)) + 1)
    if STEP_KEY not in row:
        return
    for key, value in row.items():
        if isinstance(value, dict) and value.get("_type") == "image-file":
            found.images.append((key, str(value.get("sha256", ""))))
        elif key != STEP_KEY and not key.startswith("_") and (isinstance(value, int | float) or value in NOT_FINITE):
            found.numbers.append((key, int(row[STEP_KEY]), float(value)))


def iterate_wandb_records(file: Path) -> Iterator[Any]:
    """Yields the records of a file, up to the first that is torn, as a killed process leaves it."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    # Its classes depend on the version of protobuf.
    messages: Any = wandb_internal_pb2
    for data in _iterate_payloads(file.read_bytes()):
        try:
            yield messages.Record.FromString(data)
        except DecodeError:
            return


def _iterate_payloads(data: bytes) -> Iterator[bytes]:
    if len(data) < FILE_HEADER.size or FILE_HEADER.unpack_from(data) != FILE_MAGIC:
        return
    position, parts = FILE_HEADER.size, b""
    while position + RECORD_HEADER.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < RECORD_HEADER.size:
            # The end of a block that is too short for a header
            position += left
            continue
        _, size, kind = RECORD_HEADER.unpack_from(data, position)
        position += RECORD_HEADER.size
        payload = data[position : position + size]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(payload) < size:
            return
        position += size
        parts = payload if kind in (FULL, FIRST) else parts + payload
        if kind in (FULL, LAST):
            yield parts

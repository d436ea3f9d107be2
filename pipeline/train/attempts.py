"""Attempts at the work of a stage and seed: a line when one begins, and one when it ends, with its time and machine."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, model_validator

from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.records import Count, FiniteNumber, RecordShape, read_json_rows
from firstlight.tasks.collective import rank, world_size

ATTEMPTS_FILE = "attempts.jsonl"
REPORTED_PACKAGES = ("firstlight", "torch", "ray", "mlflow")


class _MachineShape(RecordShape):
    """The facts about a machine that reports show."""

    host: str
    system: str
    device: str
    cpus: int | None
    versions: dict[str, str]
    workers: Count
    threads: Count


class _AttemptShape(RecordShape):
    """The begin or the end of an attempt."""

    began: FiniteNumber = 0.0
    machine: _MachineShape | None = None
    ended: FiniteNumber = 0.0
    seconds: Annotated[FiniteNumber, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _check_begin(self) -> "_AttemptShape":
        if "began" in self.model_fields_set and self.machine is None:
            raise ValueError("machine is missing")
        return self


ATTEMPT_SHAPE = TypeAdapter(_AttemptShape)
ATTEMPTS_ADVICE = "delete this file: the times of the attempts so far are lost then"


@dataclass(frozen=True)
class AttemptSummary:
    """The sum of all attempts at one piece of work.

    `began` and `ended` are in seconds since 1970; `ended` is None if the last attempt was killed or still runs.
    `seconds` is the sum over the attempts that ended, in success or not. `machine` is that of the last attempt.
    """

    num_attempts: int
    began: float
    ended: float | None
    seconds: float
    machine: dict[str, Any]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the host, the device and the versions of the packages of this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), **{package: version(package) for package in REPORTED_PACKAGES}}
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "device": name,
        "cpus": os.cpu_count(),
        "versions": versions,
    }


@contextlib.contextmanager
def record_attempt(folder: Path, device: torch.device) -> Iterator[None]:
    """Records the block as an attempt in `folder`. All workers may call it; rank 0 writes."""
    start = time.monotonic()
    facts = {**describe_machine(device), "workers": world_size(), "threads": torch.get_num_threads()}
    _append_row(folder, {"began": time.time(), "machine": facts})
    try:
        yield
    finally:
        _append_row(folder, {"ended": time.time(), "seconds": time.monotonic() - start})


def read_attempts(folder: Path) -> AttemptSummary | None:
    """Returns the attempts recorded in `folder`, None if there are none.

    Raises:
        DamagedRecord: a row is none that was written; names the file and the line.
    """
    rows = read_json_rows(folder / ATTEMPTS_FILE, ATTEMPT_SHAPE, ATTEMPTS_ADVICE)
    began = [row for row in rows if "began" in row]
    if not began:
        return None
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return AttemptSummary(len(began), began[0]["began"], rows[-1].get("ended"), seconds, began[-1]["machine"])


def _append_row(folder: Path, row: dict[str, Any]) -> None:
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        append_json_line(folder / ATTEMPTS_FILE, row)

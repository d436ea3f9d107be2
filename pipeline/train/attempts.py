"""When, for how long and where the work of a stage and seed was done: a line at the beginning and one at the end of every attempt."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.train.metrics import read_lines
from firstlight.tasks.collective import rank, world_size

ATTEMPTS_FILE = "attempts.jsonl"
REPORTED_PACKAGES = ("firstlight", "torch", "ray", "mlflow")


@dataclass(frozen=True)
class AttemptSummary:
    """What is known of all attempts together. `seconds`: of those that came to an end, whether in success or not."""

    num_attempts: int
    began: float  # s since 1970
    ended: float | None  # None: the last was killed, or still goes on
    seconds: float
    machine: dict[str, Any]  # of the last


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where this process runs, and by what versions."""
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
    """Around the work, on all workers: rank 0 writes."""
    start = time.monotonic()
    facts = {**describe_machine(device), "workers": world_size(), "threads": torch.get_num_threads()}
    _append_row(folder, {"began": time.time(), "machine": facts})
    try:
        yield
    finally:
        _append_row(folder, {"ended": time.time(), "seconds": time.monotonic() - start})


def read_attempts(folder: Path) -> AttemptSummary | None:
    """None where nothing was begun."""
    rows = read_lines(folder / ATTEMPTS_FILE)
    began = [row for row in rows if "began" in row]
    if not began:
        return None
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return AttemptSummary(len(began), began[0]["began"], rows[-1].get("ended"), seconds, began[-1]["machine"])


def _append_row(folder: Path, row: dict[str, Any]) -> None:
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        append_json_line(folder / ATTEMPTS_FILE, row)

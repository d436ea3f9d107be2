"""The file that a training, or a pass over images, writes its numbers to: the driver follows it, shows progress and hands the rows to MLflow.

A row is {"step", "of", ...numbers}, {"note": a line for the user} or {"spent": seconds by what took them, none of them in the rows of steps}.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.data.plan import TrainingPlan
from firstlight.pipeline.files import append_json_line, write_atomically
from firstlight.tasks.collective import all_sum, barrier, rank, world_size
from firstlight.tasks.timer import STEP_TIMER

METRICS_FILE = "metrics.jsonl"
DATA_PART, TIME_PREFIX, SPENT_KEY = (
    "data",
    "time_",
    "spent",
)  # a part of a step, what precedes its name in a row, and the key of seconds outside of rows
DROPPED_IDS_FILE = "tails.jsonl"
# A training of which a worker waits for images for more than this share of the time says so: at its end, if it took at least as long as the
# second, or on the way, after the third
MAX_WAIT_SHARE, WAIT_NOTE_MIN_S, WAIT_NOTE_EARLY_S = 0.1, 20.0, 300.0


def append(folder: Path, row: dict[str, Any]) -> None:
    """A row for the driver, which follows the file: numbers of a step, or {"note": a line for the user}."""
    if rank() == 0:
        append_json_line(folder / METRICS_FILE, row)


class SweepProgress:
    """Progress of a pass over images without training, in the same file as a training's."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total, self.done = folder, total, 0
        self.started = self.shown = time.monotonic()
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)

    def advance(self, images: int) -> None:
        """`images` more are done on this worker; the others are taken to be as far."""
        self.done = min(self.done + images * world_size(), self.total)
        now = time.monotonic()
        if now - self.shown > 1.0 or self.done == self.total:
            self.shown = now
            rate = self.done / max(now - self.started, 1e-9)
            append(self.folder, {"step": self.done, "of": self.total, "time": time.time(), "images_per_s": rate})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All that a training or a pass over images has left in the file."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a killed worker
            rows.append(json.loads(line))
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged rows of a training, in the order of their steps."""
    return [row for row in read_lines(path) if "loss" in row]


class Clock:
    """Speed and waiting time of a training since the last log, and `time_<part>`, the shares of it that rank 0 spent on each part of its steps
    (`firstlight.tasks.timer`). Collective. `first`: the number of steps that were done before."""

    def __init__(self, folder: Path, plan: TrainingPlan, total_steps: int, first: int, device: torch.device) -> None:
        self.folder, self.plan, self.total_steps, self.device = folder, plan, total_steps, device
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()
        self.told = False
        self.idle, self.begun = 0.0, 0.0  # over all steps but the first, whose batch nothing could be decoded beside
        if rank() == 0:
            _keep(folder / METRICS_FILE, lambda row: row.get("step", 0) <= first)
        barrier()

    def waiting(self, stream: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`stream`, with the time that its consumer waits for it added up."""
        with STEP_TIMER.time_thread(self.device):
            while True:
                start = time.monotonic()
                batch = next(stream, None)
                now = time.monotonic()
                self.waited += now - start
                self.idle, self.begun = (self.idle + now - start, self.begun) if self.begun else (0.0, now)
                if batch is None:
                    return
                self.steps += 1
                yield batch

    def close(self) -> None:
        """What was spent after the last log: on the last checkpoint."""
        append(self.folder, {SPENT_KEY: STEP_TIMER.read_seconds()})

    def aside(self, looked: tuple[dict[str, float], float]) -> dict[str, float]:
        """Numbers whose making took so many seconds, which are none of the training's."""
        values, seconds = looked
        self.since += seconds
        self.begun += seconds
        append(self.folder, {SPENT_KEY: {"looks": seconds}})
        return values

    def log(self, step: int, values: dict[str, float]) -> None:
        """`values` are already averaged over workers. The waiting time is a share of each worker's, and the mean of all: they step together, so
        where one waits the others do, but for its gradients."""
        now = time.monotonic()
        elapsed = max(now - self.since, 1e-9)
        waits, idle = self._of_each(self.waited / elapsed), self._of_each(self.idle / max(now - self.begun, 1e-9))
        each = {f"data_wait_worker{k}": share for k, share in enumerate(waits)} if world_size() > 1 else {}
        speed = {
            "images_per_s": self.steps * self.plan.batch_size / elapsed,
            "data_wait": sum(waits) / len(waits),
            **each,
        }
        spent = STEP_TIMER.read_seconds()
        spent[DATA_PART] = spent.get(DATA_PART, 0.0) + self.waited
        shares = {f"{TIME_PREFIX}{name}": seconds / elapsed for name, seconds in sorted(spent.items())}
        epoch = (step - 1) // self.plan.steps
        append(
            self.folder,
            {"step": step, "of": self.total_steps, "epoch": epoch, "time": time.time(), **values, **speed, **shares},
        )
        self.steps, self.waited, self.since = 0, 0.0, now
        if not self.told and now - self.begun > (WAIT_NOTE_MIN_S if step == self.total_steps else WAIT_NOTE_EARLY_S):
            self._tell_of_waiting(idle)

    def _tell_of_waiting(self, idle: list[float]) -> None:
        """Of the worker that waited most."""
        share = max(idle)
        if share > MAX_WAIT_SHARE:
            self.told = True
            who = f"worker {idle.index(share)} " if world_size() > 1 else ""
            hint = "try a larger stream.tasks or stream.prefetch, or stream.resident_mb"
            append(self.folder, {"note": f"{who}waited for images {share:.0%} of the time: {hint}"})

    def _of_each(self, value: float) -> list[float]:
        """`value` of every worker. Collective."""
        values = torch.zeros(world_size(), device=self.device)
        values[rank()] = value
        return [float(share) for share in all_sum(values).tolist()]


class Tails:
    """The ids that each epoch leaves out, as they do not fill a batch: a row {"epoch", "ids"} an epoch that leaves out any. On rank 0.

    `first`: the number of steps that were done before.
    """

    def __init__(self, folder: Path, plan: TrainingPlan, first: int) -> None:
        self.file, self.plan = folder / DROPPED_IDS_FILE, plan
        if rank() == 0:
            _keep(self.file, lambda row: row["epoch"] < first // plan.steps)

    def write(self, epoch: int) -> None:
        """Before the first step of an epoch, and again when one is resumed in its middle."""
        if rank() == 0 and len(ids := self.plan.tail(epoch)):
            append_json_line(self.file, {"epoch": epoch, "ids": ids.tolist()})


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows behind the checkpoint that a training continues from: those steps are made again, with equal numbers."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed worker
            continue
        if wanted(row):
            kept.append(json.dumps(row) + "\n")
    write_atomically(path, "".join(kept).encode())

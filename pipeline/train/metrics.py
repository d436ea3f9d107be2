"""Metrics of a training or of a pass over images, in a file that the driver follows for progress and for MLflow.

A row is {"step", "of", ...numbers}, {"note": a line for the user} or {"spent": seconds by part}: time that the rows of
steps do not include.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, model_validator

from firstlight.pipeline.data.plan import TrainingPlan
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.files import append_json_line, write_atomically
from firstlight.pipeline.records import Count, DamagedRecord, FiniteNumber, RecordShape, read_json_rows
from firstlight.pipeline.train.accelerator.utilization import UtilizationMeter
from firstlight.tasks.collective import all_sum, barrier, broadcast_object, rank, world_size
from firstlight.tasks.device.timer import STEP_TIMER

METRICS_FILE = "metrics.jsonl"
# The part of a step that loads its data.
DATA_PART = "data"
# Precedes the name of a part in a row.
TIME_PREFIX = "time_"
# The key of seconds that the rows of steps do not include.
SPENT_KEY = "spent"
# The key of the number of steps in a whole epoch: the last one of a training may be partial.
STEPS_PER_EPOCH_KEY = "steps_per_epoch"
DROPPED_IDS_FILE = "tails.jsonl"
MAX_DROPPED_IDS = 1_000_000
# A note is written if a worker waits for images for more than this share of the time: at the end of a training of at
# least WAIT_NOTE_MIN_S seconds, and during it after WAIT_NOTE_EARLY_S seconds.
MAX_WAIT_SHARE, WAIT_NOTE_MIN_S, WAIT_NOTE_EARLY_S = 0.1, 20.0, 300.0


class _MetricsShape(RecordShape):
    """A row of metrics. All keys but these are numbers."""

    __pydantic_extra__: dict[str, float]
    step: Count = 0
    of: Annotated[int, Field(ge=1, le=2**53)] = 1
    time: FiniteNumber = 0.0
    images_per_s: float = 0.0
    note: str = ""
    spent: dict[str, float] = Field({})

    @model_validator(mode="after")
    def _check_step(self) -> "_MetricsShape":
        missing = {"step", "of", "time", "images_per_s"} - self.model_fields_set
        if missing and not self.model_fields_set & {"note", "spent"}:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        return self


class _DroppedShape(RecordShape):
    """A row of `DROPPED_IDS_FILE`."""

    epoch: Count
    ids: list[Count]


METRICS_SHAPE, DROPPED_SHAPE = TypeAdapter(_MetricsShape), TypeAdapter(_DroppedShape)
METRICS_ADVICE = "delete this file: curves and numbers of the steps so far are lost then"


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Appends a row to the metrics file of `folder`, on rank 0."""
    if rank() == 0:
        append_json_line(folder / METRICS_FILE, row)


class PassProgress:
    """Progress of a pass over images without training, in the same file as a training's metrics."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total, self.done = folder, total, 0
        self.started = self.logged_at = time.monotonic()
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)

    def add_images(self, images: int) -> None:
        """Counts `images` more on this worker, and assumes as many on each of the others."""
        self.done = min(self.done + images * world_size(), self.total)
        now = time.monotonic()
        if now - self.logged_at > 1.0 or self.done == self.total:
            self.logged_at = now
            rate = self.done / max(now - self.started, 1e-9)
            append_row(self.folder, {"step": self.done, "of": self.total, "time": time.time(), "images_per_s": rate})


def read_metrics_rows(path: Path) -> list[dict[str, Any]]:
    """Returns all rows of a metrics file, [] if there is none.

    Raises:
        DamagedRecord: a row is none that was written; names the file and the line.
    """
    return read_json_rows(path, METRICS_SHAPE, METRICS_ADVICE)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the logged rows of a training, in the order of their steps.

    Raises:
        DamagedRecord: as `read_metrics_rows`.
    """
    return [row for row in read_metrics_rows(path) if "loss" in row]


class MetricsLogger:
    """Logs the losses of a training with its speed. All methods but `close` are collective.

    A row has the images per second and the share of waiting for data since the last row, and `time_<part>`, the share
    that rank 0 spent on each part of its steps (`firstlight.tasks.device.timer`). On CPUs it has the images per second
    of CPU time as well, which other work on the machine hardly changes; it counts all threads of all workers, and no
    tasks of Ray Data. On devices whose peak is known it has `mfu`, the share of that peak (of `meter`). `first` is the
    number of steps that were done before.
    """

    def __init__(
        self,
        folder: Path,
        plan: TrainingPlan,
        total_steps: int,
        first: int,
        device: torch.device,
        meter: UtilizationMeter | None = None,
    ) -> None:
        self.folder, self.plan, self.total_steps, self.device = folder, plan, total_steps, device
        self.meter = meter
        self.steps, self.waited, self.since, self.cpu_since = 0, 0.0, time.monotonic(), time.process_time()
        self.noted = False
        # The idle time is counted over all steps but the first, as no step runs while its batch is decoded.
        self.idle, self.second_step_at = 0.0, 0.0
        _keep_rows(folder / METRICS_FILE, METRICS_SHAPE, lambda row: row.get("step", 0) <= first)
        barrier()

    def time_waits(self, stream: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the batches of `stream`, and adds up the time that its consumer waits for them."""
        with STEP_TIMER.time_thread(self.device):
            while True:
                start = time.monotonic()
                batch = next(stream, None)
                now = time.monotonic()
                self.waited += now - start
                self.idle, self.second_step_at = (
                    (self.idle + now - start, self.second_step_at) if self.second_step_at else (0.0, now)
                )
                if batch is None:
                    return
                self.steps += 1
                yield batch

    def close(self) -> None:
        """Writes the time since the last row, which the last checkpoint took."""
        append_row(self.folder, {SPENT_KEY: STEP_TIMER.read_seconds()})

    @contextlib.contextmanager
    def exclude_time(self, part: str | None = None) -> Iterator[None]:
        """Excludes the time inside, in which no step runs, from the training's time.

        `part`: what the time is spent on, for the report; None if it belongs to no part.
        """
        started, cpu_started = time.monotonic(), time.process_time()
        yield
        seconds = time.monotonic() - started
        self.since += seconds
        self.second_step_at += seconds
        self.cpu_since += time.process_time() - cpu_started
        if part is not None:
            append_row(self.folder, {SPENT_KEY: {part: seconds}})

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Writes the row of a step. `values` are already averaged over workers.

        The waiting time is logged for each worker, and as the mean over workers: they step together, so that all wait
        if one does, the others for its gradients.
        """
        now = time.monotonic()
        elapsed = max(now - self.since, 1e-9)
        waits, idle = (
            self._gather_value(self.waited / elapsed),
            self._gather_value(self.idle / max(now - self.second_step_at, 1e-9)),
        )
        each = {f"data_wait_worker{k}": share for k, share in enumerate(waits)} if world_size() > 1 else {}
        speed = {
            "images_per_s": self.steps * self.plan.batch_size / elapsed,
            "data_wait": sum(waits) / len(waits),
            **each,
        }
        if self.meter is not None:
            speed |= self.meter.compute_share(speed["images_per_s"] / world_size())
        cpu_now = time.process_time()
        if self.device.type == "cpu":
            cpu_s = sum(self._gather_value(cpu_now - self.cpu_since))
            speed["images_per_cpu_s"] = self.steps * self.plan.batch_size / max(cpu_s, 1e-9)
        spent = STEP_TIMER.read_seconds()
        spent[DATA_PART] = spent.get(DATA_PART, 0.0) + self.waited
        shares = {f"{TIME_PREFIX}{name}": seconds / elapsed for name, seconds in sorted(spent.items())}
        epoch = (step - 1) // self.plan.steps
        append_row(
            self.folder,
            {
                "step": step,
                "of": self.total_steps,
                "epoch": epoch,
                STEPS_PER_EPOCH_KEY: self.plan.steps,
                "time": time.time(),
                **values,
                **speed,
                **shares,
            },
        )
        self.steps, self.waited, self.since, self.cpu_since = 0, 0.0, now, cpu_now
        if not self.noted and now - self.second_step_at > (
            WAIT_NOTE_MIN_S if step == self.total_steps else WAIT_NOTE_EARLY_S
        ):
            self._note_waiting(idle)

    def _note_waiting(self, idle: list[float]) -> None:
        """Writes a note if the worker that waited most waited for more than MAX_WAIT_SHARE of the time."""
        share = max(idle)
        if share > MAX_WAIT_SHARE:
            self.noted = True
            who = f"worker {idle.index(share)} " if world_size() > 1 else ""
            hint = "try a larger stream.tasks or stream.prefetch, or stream.resident_mb"
            append_row(self.folder, {"note": f"{who}waited for images {share:.0%} of the time: {hint}"})

    def _gather_value(self, value: float) -> list[float]:
        """Returns `value` of every worker. It is collective."""
        values = torch.zeros(world_size(), device=self.device)
        values[rank()] = value
        return [float(share) for share in all_sum(values).tolist()]


class DroppedIds:
    """The ids that an epoch leaves out: a row {"epoch", "ids"} for each such epoch.

    They do not fill a batch, or the training ends before them. Rank 0 writes. `first` is the number of steps that were
    done before, of `total_steps`. The row of an epoch that ends more than `MAX_DROPPED_IDS` images early has its number
    of "steps", and the ids of later steps are left out.
    """

    def __init__(self, folder: Path, plan: TrainingPlan, first: int, total_steps: int) -> None:
        self.file, self.plan, self.total_steps = folder / DROPPED_IDS_FILE, plan, total_steps
        _keep_rows(self.file, DROPPED_SHAPE, lambda row: self._last_step(row["epoch"]) <= first)

    def write_epoch(self, epoch: int) -> None:
        """Writes the row of an epoch. It is called before the epoch's first step, and again if the epoch is resumed."""
        if rank() == 0:
            steps = self._last_step(epoch) - epoch * self.plan.steps
            if (self.plan.steps - steps) * self.plan.batch_size > MAX_DROPPED_IDS:
                append_json_line(self.file, {"epoch": epoch, "ids": self.plan.tail(epoch).tolist(), "steps": steps})
            elif len(ids := self.plan.tail(epoch, steps)):
                append_json_line(self.file, {"epoch": epoch, "ids": ids.tolist()})

    def _last_step(self, epoch: int) -> int:
        """Returns the number of steps that are done at the end of an epoch."""
        return min((epoch + 1) * self.plan.steps, self.total_steps)


def _keep_rows(path: Path, shape: TypeAdapter[Any], wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the rows after the checkpoint that a training continues from: it repeats those steps identically.

    It is collective; rank 0 reads and writes.

    Raises:
        StopTraining: on all ranks: the file has a row that no training has written; names it.
    """
    problem = None
    if rank() == 0 and path.exists():
        try:
            rows = read_json_rows(path, shape, METRICS_ADVICE)
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows if wanted(row)).encode())
        except DamagedRecord as error:
            problem = str(error)
    if problem := broadcast_object(problem):
        raise StopTraining(problem)

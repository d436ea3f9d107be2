"""The training loop. Pretraining methods and downstream tasks share it; it knows only `Learner`.

The state after step k is a function of (config, seed, k) alone: batches come from the plan, every step draws its random numbers from
(seed, step, rank), and a checkpoint holds the rest. A training that is killed and continued on as many workers ends bit-identical to one that
never stopped.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import fault
from pipeline.checkpoint import Checkpoint, Checkpoints
from pipeline.config import Training
from pipeline.durable import write_atomically, write_json
from pipeline.errors import StopTraining
from pipeline.optim import build_optimizer, build_schedule
from pipeline.plan import Plan
from pipeline.stream import Arrays, Loader, Options, TrainOrder, batches
from tasks.collective import all_sum, barrier, broadcast_object, gather_objects, rank, world
from tasks.learner import Batch, Learner

METRICS = "metrics.jsonl"
CHECKPOINT_AGE_S = 20.0


@dataclass(frozen=True)
class Job:
    """One training: what to train on, how, and where its files go (a folder that all workers see)."""

    folder: Path
    training: Training
    plan: Plan
    loader: Loader
    seed: int
    options: Options
    device: torch.device

    @property
    def total_steps(self) -> int:
        return self.training.epochs * self.plan.steps


def fit(job: Job, learner: Learner) -> None:
    """Train `learner` in place, to the end, from the newest checkpoint in the job's folder if there is one. Collective.

    Raises:
        StopTraining: on all ranks: a loss that is not finite, a full disk, no whole checkpoint left.
    """
    trainer = _Trainer(job, learner)
    step, notes = trainer.resume()
    clock = _Clock(job, step)
    for line in notes:
        _append(job.folder, {"note": line})
    for arrays in clock.waiting(batches(job.loader, TrainOrder(job.plan, rank(), world(), step, job.total_steps), trainer.rows, job.options)):
        if step % job.plan.steps == 0 or step == clock.first:
            learner.begin_epoch(step // job.plan.steps)
        losses = trainer.step(to_batch(arrays, job.device, job.training.channels_last), step)
        step += 1
        last = step == job.total_steps
        if step % job.training.log_every == 0 or last:
            clock.log(step, {**_means(losses), "lr": trainer.optimizer.param_groups[0]["lr"]})
        fault.maybe(rank(), step)
        if last or trainer.checkpoint_due(step):
            trainer.save(step)
    learner.eval()


def to_batch(arrays: Arrays, device: torch.device, channels_last: bool) -> Batch:
    """uint8 (B, V, S, S, 3) from the wire -> float views (B, 3, S, S) in 0..1 on the device."""
    pixels = torch.from_numpy(np.require(arrays["views"], requirements="W")).to(device, non_blocking=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    views = tuple(v.permute(0, 3, 1, 2).float().div_(255.0).contiguous(memory_format=layout) for v in pixels.unbind(1))
    ids, labels = (torch.from_numpy(np.array(arrays[key])).to(device) for key in ("id", "label"))
    return Batch(ids, labels, views)


def _means(losses: dict[str, Tensor]) -> dict[str, float]:
    """Averages over workers; collective."""
    return {name: float(all_sum(value.detach().double()) / world()) for name, value in losses.items()}


class _Trainer:
    """A learner with its optimiser, schedule and checkpoints."""

    def __init__(self, job: Job, learner: Learner) -> None:
        self.job, self.learner = job, learner
        learner.place(job.device)
        if job.training.channels_last:
            learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learner.train()
        if job.training.compile:
            learner.encoder.compile()  # type: ignore[union-attr, operator]
        trained = [p for p in learner.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(job.training.optimizer, trained)
        schedule = job.training.schedule
        self.per_epoch = schedule is not None and schedule.interval == "epoch"
        self.schedule = build_schedule(schedule, self.optimizer, job.training.epochs if self.per_epoch else job.total_steps)
        self.checkpoints = Checkpoints(job.folder / "checkpoints")
        self.saved = time.monotonic()
        self.model: nn.Module = DistributedDataParallel(learner) if world() > 1 else learner

    @property
    def rows(self) -> int:
        """Images of a global batch that this worker sees."""
        return self.job.plan.batch_size // world()

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One update. `step` counts from 0 over the whole training.

        Raises:
            StopTraining: the loss is not finite on some worker; raised on all, before anything is updated.
        """
        torch.manual_seed(_step_seed(self.job.seed, step, rank()))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.job.training.precision == "bf16"):
            losses: dict[str, Tensor] = self.model(batch)
        self._stop_unless_finite(losses["loss"], batch, step)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if not self.per_epoch or (step + 1) % self.job.plan.steps == 0:
            self.schedule.step()
        self.learner.end_step()
        return losses

    def _stop_unless_finite(self, loss: Tensor, batch: Batch, step: int) -> None:
        broken = ~torch.isfinite(loss.detach())
        if not bool(all_sum(broken.float()) > 0):
            return
        ids = sorted(i for part in gather_objects(batch.ids.tolist() if bool(broken) else []) for i in part)
        if rank() == 0:
            write_json(self.job.folder / "nonfinite.json", {"step": step, "ids": ids})
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        raise StopTraining(
            f"{self.job.folder.name}: the loss of step {step} is not finite; nothing was updated. "
            f"Its {len(ids)} image ids: {shown} (all in {self.job.folder / 'nonfinite.json'}). A lower optimizer.lr is the usual cure"
        )

    def checkpoint_due(self, step: int) -> bool:
        """By `checkpoint_every`; for 0 at the end of an epoch, if the last checkpoint is old enough. When one is taken changes no result."""
        if self.job.training.checkpoint_every:
            return step % self.job.training.checkpoint_every == 0
        return step % self.job.plan.steps == 0 and bool(broadcast_object(time.monotonic() - self.saved > CHECKPOINT_AGE_S))

    def save(self, step: int) -> None:
        shared = {
            "model": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        shard = {name: table.state_dict() for name, table in self.learner.tables.items()}
        self.checkpoints.save(step, shared, shard, {"plan": self.job.plan.key, "threads": torch.get_num_threads(), "torch": torch.__version__})
        self.saved = time.monotonic()

    def resume(self) -> tuple[int, list[str]]:
        """Load the newest checkpoint; the number of steps done, and what the user should know."""
        found, complaints = self.checkpoints.newest()
        notes = [f"passed over a damaged checkpoint: {line}" for line in complaints]
        if found is None:
            return 0, notes
        if found.meta["plan"] != self.job.plan.key:
            raise StopTraining(f"{self.job.folder}: its checkpoint was made with other images or another order; delete the folder to train anew")
        self._load(found)
        if found.meta["threads"] != torch.get_num_threads() or found.meta["torch"] != torch.__version__ or found.meta["world"] != world():
            notes.append("continued with another number of workers, threads or version of torch: equal up to rounding, not bit by bit")
        if found.step < self.job.total_steps:
            notes.append(f"continued from the checkpoint of step {found.step} of {self.job.total_steps}")
        return found.step, notes

    def _load(self, found: Checkpoint) -> None:
        self.learner.load_state_dict(found.shared["model"])
        self.optimizer.load_state_dict(found.shared["optimizer"])
        self.schedule.load_state_dict(found.shared["schedule"])
        for name, table in self.learner.tables.items():
            table.load_state_dicts([shard[name] for shard in found.shards])


def _step_seed(seed: int, step: int, rank_: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank_)).generate_state(1, np.uint64)[0] >> 1)


def _append(folder: Path, row: dict[str, Any]) -> None:
    """A row for the driver, which follows the file: numbers of a step, or {"note": a line for the user}."""
    if rank() == 0:
        with open(folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class SweepProgress:
    """Progress of a pass over images without training, in the same file as a training's."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total, self.done = folder, total, 0
        self.started = self.shown = time.monotonic()
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)

    def advance(self, images: int) -> None:
        """`images` more are done on this worker; the others are taken to be as far."""
        self.done = min(self.done + images * world(), self.total)
        now = time.monotonic()
        if now - self.shown > 1.0 or self.done == self.total:
            self.shown = now
            rate = self.done / max(now - self.started, 1e-9)
            _append(self.folder, {"step": self.done, "of": self.total, "time": time.time(), "images_per_s": rate})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged rows of a training, in the order of their steps."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a killed worker
            rows.append(json.loads(line))
    return [row for row in rows if "loss" in row]


class _Clock:
    """Speed and waiting time since the last log; appends to metrics.jsonl, which the driver follows."""

    def __init__(self, job: Job, first: int) -> None:
        self.job, self.first = job, first
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()
        if rank() == 0:
            job.folder.mkdir(parents=True, exist_ok=True)
            _forget_after(job.folder / METRICS, first)
        barrier()

    def waiting(self, stream: Iterator[Arrays]) -> Iterator[Arrays]:
        """`stream`, with the time that its consumer waits for it added up."""
        while True:
            start = time.monotonic()
            batch = next(stream, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            self.steps += 1
            yield batch

    def log(self, step: int, values: dict[str, float]) -> None:
        """Collective: `values` are already averaged, the waiting time is averaged here."""
        now = time.monotonic()
        elapsed = max(now - self.since, 1e-9)
        speed = {
            "images_per_s": self.steps * self.job.plan.batch_size / elapsed,
            "data_wait": float(all_sum(torch.tensor(self.waited / elapsed, device=self.job.device))) / world(),
        }
        epoch = (step - 1) // self.job.plan.steps
        _append(self.job.folder, {"step": step, "of": self.job.total_steps, "epoch": epoch, "time": time.time(), **values, **speed})
        self.steps, self.waited, self.since = 0, 0.0, now


def _forget_after(path: Path, step: int) -> None:
    """Drop the rows behind the checkpoint that a training continues from: those steps are made again, with equal numbers."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed worker
            continue
        if row.get("step", 0) <= step:
            kept.append(json.dumps(row) + "\n")
    write_atomically(path, "".join(kept).encode())

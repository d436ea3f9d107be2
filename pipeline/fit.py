"""The training loop. Pretraining methods and downstream tasks share it; it knows only `Learner`.

The state after step k is a function of (config, seed, k) alone: batches come from the plan, every step draws its random numbers from
(seed, step, rank), and a checkpoint holds the rest. A training that is killed and continued on as many workers ends bit-identical to one that
never stopped.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline import fault, resident
from pipeline.checkpoint import Checkpoint, Checkpoints
from pipeline.durable import write_json
from pipeline.errors import Stopped, StopTraining
from pipeline.job import Job, to_batch
from pipeline.metrics import DATA, Clock, Tails, append
from pipeline.optim import build_optimizer, build_schedule
from pipeline.stream import TrainOrder, batches
from tasks.collective import all_sum, broadcast_object, gather_objects, rank, share_buffers, world
from tasks.learner import Batch, Learner
from tasks.stopwatch import part

CHECKPOINT_AGE_S = 20.0
STOP = "stop"  # a file in a job's folder that asks its training to stop


class Watcher(Protocol):
    """Looks at the learner on the way, and leaves it as it is."""

    def due(self, step: int) -> bool:
        """Whether to look after `step` steps; the same on all workers."""
        ...

    def look(self) -> tuple[dict[str, float], float]:
        """Numbers to log beside the losses, and the seconds that it took. Collective."""
        ...


def fit(job: Job, learner: Learner, watch: Watcher | None = None) -> None:
    """Train `learner` in place, to the end, from the newest checkpoint in the job's folder if there is one. Collective.

    Raises:
        StopTraining: on all ranks: a loss that is not finite, a full disk, no whole checkpoint left, or (Stopped) a file that asks for it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(job, learner)
    step, notes = trainer.resume()
    if step == 0 and learner.looks_first:
        _first_look(job, learner, trainer.rows)
    order = TrainOrder(job.plan, rank(), world(), step, job.total_steps)
    stream, told = _stream(job, order, trainer.rows)
    clock, tails, first = Clock(job.folder, job.plan, job.total_steps, step, job.device), Tails(job.folder, job.plan, step), step
    for line in notes + told:
        append(job.folder, {"note": line})
    for arrays in clock.waiting(stream):
        if step % job.plan.steps == 0 or step == first:
            learner.begin_epoch(step // job.plan.steps)
            tails.write(step // job.plan.steps)
        with part(DATA):
            batch = to_batch(arrays, job.device, job, step)
        losses = trainer.step(batch, step)
        step += 1
        last = step == job.total_steps
        looks = watch is not None and watch.due(step)
        if step % job.training.log_every == 0 or last or looks:
            seen = clock.aside(watch.look()) if watch is not None and looks else {}
            clock.log(step, {**_means(losses), "lr": trainer.optimizer.param_groups[0]["lr"], **seen})
            _stop_if_asked(job)
        fault.maybe(rank(), step)
        if last or trainer.checkpoint_due(step):
            trainer.save(step)
    clock.close()
    share_buffers(learner)  # of `norm: batch` every worker has its own; the checkpoint, and what is handed on, has those of rank 0
    learner.eval()


@torch.no_grad()
def _first_look(job: Job, learner: Learner, rows: int) -> None:
    """Show the learner all batches of the first epoch."""
    append(job.folder, {"note": "all images are looked at once before the first step"})
    learner.eval()
    order = TrainOrder(job.plan, rank(), world(), 0, job.plan.steps)
    arriving, told = _stream(job, order, rows)
    for line in told:
        append(job.folder, {"note": line})
    for step, arrays in enumerate(arriving):
        learner.look(to_batch(arrays, job.device, job, step))
        learner.end_step()
    learner.train()


def _stream(job: Job, order: TrainOrder, rows: int) -> tuple[Iterator[dict[str, Any]], list[str]]:
    """This worker's batches, and what the user should know of where they come from. Collective."""
    if job.loader.targets is not None:  # boxes and masks are moved one by one, where they are read
        return batches(job.loader, order, rows, job.options), []
    if job.options.resident is None or len(order) == 0:
        return resident.streamed(job.loader, order, rows, job.options, job.device), []
    held, notes = resident.hold(job.loader, job.options, job.device)
    return resident.batches(held, job.loader, order, job.options), notes


def _stop_if_asked(job: Job) -> None:
    """Collective: a file that not all ranks see at once must not part them.

    Raises:
        Stopped: on all ranks.
    """
    file = job.folder / STOP
    why = broadcast_object(file.read_text("utf-8") if rank() == 0 and file.exists() else None)
    if why is not None:
        raise Stopped(why)


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
        self.optimizer = build_optimizer(job.training.optimizer, learner.parameter_groups())
        schedule = job.training.schedule
        self.per_epoch = schedule is not None and schedule.interval == "epoch"
        self.schedule = build_schedule(schedule, self.optimizer, job.training.epochs if self.per_epoch else job.total_steps)
        self.epoch_loss = 0.0  # summed over the steps of the epoch so far
        self.checkpoints = Checkpoints(job.folder / "checkpoints")
        self.saved = time.monotonic()
        self.model: nn.Module = DistributedDataParallel(_Step(learner)) if world() > 1 else _Step(learner)

    @property
    def rows(self) -> int:
        """Images of a global batch that this worker sees."""
        return self.job.plan.batch_size // world()

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One update. `step` counts from 0 over the whole training.

        Raises:
            StopTraining: the loss is not finite on some worker; raised on all, before anything is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._whole(batch, step) if self.job.training.accumulate == 1 else self._in_parts(batch, step)
        with part("optimizer"):
            if self.job.training.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.learner.parameters(), self.job.training.clip_norm)
            self.optimizer.step()
            self._advance_schedule(step + 1)
        self.learner.end_step()
        return losses

    def _whole(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The losses of this worker's share, their gradient in the parameters."""
        with self._drawing(step, 0), part("forward"):
            losses: dict[str, Tensor] = self.model(batch)
        self._stop_unless_finite(losses["loss"], batch, step)
        with part("backward"):
            losses["loss"].backward()  # type: ignore[no-untyped-call]
        return losses

    def _in_parts(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The same, with the activations of one part in memory at a time (Gao et al. 2021, "Scaling deep contrastive learning batch size under
        memory limited setup"): every part is embedded without gradient; the loss of the whole gives the gradient at its embedding; every part
        is embedded again, now to carry its share of that gradient back. Batch statistics are those of a part.
        """
        share_buffers(self.learner)  # as DistributedDataParallel does, which the first pass goes around
        size = len(batch.ids) // self.job.training.accumulate
        parts = [batch.part(start, start + size) for start in range(0, len(batch.ids), size)]
        embedded = []
        for k, images in enumerate(parts):
            with torch.no_grad(), self._drawing(step, k), part("forward"):
                embedded.append(self.learner.embed(images))
        outputs = tuple(torch.cat(column).requires_grad_() for column in zip(*embedded, strict=True))
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.job.training.precision == "bf16"), part("forward"):
            losses = self.learner.loss(outputs, batch)
        self._stop_unless_finite(losses["loss"], batch, step)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        buffers = [buffer.clone() for buffer in self.learner.buffers()]  # running statistics: the parts count once
        for k, images in enumerate(parts):
            gradients = [None if o.grad is None else o.grad[k * size : (k + 1) * size] for o in outputs]
            waiting = self.model.no_sync() if world() > 1 and k + 1 < len(parts) else contextlib.nullcontext()  # type: ignore[operator]
            with waiting:
                with self._drawing(step, k), part("forward"):
                    carried = self.model(images, gradients)
                with part("backward"):
                    carried.backward()
        for buffer, value in zip(self.learner.buffers(), buffers, strict=True):
            buffer.copy_(value)
        return losses

    @contextlib.contextmanager
    def _drawing(self, step: int, part: int) -> Iterator[None]:
        """Where the learner draws random numbers: those of (seed, step, rank, part), in the training's precision."""
        torch.manual_seed(_step_seed(self.job.seed, step, rank(), part))
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.job.training.precision == "bf16"):
            yield

    def _advance_schedule(self, done: int) -> None:
        ends_epoch = done % self.job.plan.steps == 0
        if isinstance(self.schedule, ReduceLROnPlateau):
            if not self.per_epoch:
                self.schedule.step(self.step_loss)
            elif ends_epoch:
                self.schedule.step(self.epoch_loss / self.job.plan.steps)
        elif ends_epoch or not self.per_epoch:
            self.schedule.step()
        if ends_epoch:
            self.epoch_loss = 0.0

    def _stop_unless_finite(self, loss: Tensor, batch: Batch, step: int) -> None:
        """Also keeps the loss of the step, averaged over workers: a plateau is seen by all of them alike."""
        broken = ~torch.isfinite(loss.detach())
        mean, broken_somewhere = (all_sum(torch.stack((loss.detach().double(), broken.double()))) / world()).tolist()
        if not broken_somewhere:
            self.step_loss = mean
            self.epoch_loss += mean
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

    @part("checkpoint")
    def save(self, step: int) -> None:
        shared = {
            "model": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch_loss": self.epoch_loss,
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
            notes.append("continued with another number of workers, threads or version of torch: not bit by bit what it would have been")
        if found.step < self.job.total_steps:
            notes.append(f"continued from the checkpoint of step {found.step} of {self.job.total_steps}")
        return found.step, notes

    def _load(self, found: Checkpoint) -> None:
        self.learner.load_state_dict(found.shared["model"])
        self.optimizer.load_state_dict(found.shared["optimizer"])
        self.schedule.load_state_dict(found.shared["schedule"])
        self.epoch_loss = found.shared["epoch_loss"]
        for name, table in self.learner.tables.items():
            table.load_state_dicts([shard[name] for shard in found.shards])


class _Step(nn.Module):
    """What DistributedDataParallel wraps: all that carries gradients into the parameters passes through its `forward`."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch, gradients: Sequence[Tensor | None] | None = None) -> Any:
        """The losses of a batch; or, with the gradients of a loss at its embedding, a scalar whose gradient in the parameters is that loss's."""
        if gradients is None:
            return self.learner(batch)
        pairs = zip(self.learner.embed(batch), gradients, strict=True)
        return torch.stack([(output * gradient).sum() for output, gradient in pairs if gradient is not None]).sum()


def _step_seed(seed: int, step: int, rank_: int, part: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank_, part)).generate_state(1, np.uint64)[0] >> 1)

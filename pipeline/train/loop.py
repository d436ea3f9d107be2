"""The training loop. Pretraining methods and downstream tasks share it; it knows only `Learner`.

The state after step k is a function of (config, seed, k) alone: batches come from the plan, every step draws its random numbers from
(seed, step, rank), and a checkpoint holds the rest. A training that is killed and continued on as many workers ends bit-identical to one that
never stopped.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from firstlight.pipeline.data.stream import TrainOrder, stream_batches
from firstlight.pipeline.errors import Paused, Stopped
from firstlight.pipeline.train import device_cache, failures, watchdog
from firstlight.pipeline.train.failures import STEP_NOTE_PREFIX
from firstlight.pipeline.train.metrics import DATA_PART, Clock, Tails, append
from firstlight.pipeline.train.trainer import Trainer
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.collective import all_sum, broadcast_buffers, broadcast_object, rank, world_size
from firstlight.tasks.learner import Learner
from firstlight.tasks.timer import time_part

STOP_FILE = "stop"  # a file in a job's folder that asks its training to stop


class Monitor(Protocol):
    """Looks at the learner on the way, and leaves it as it is."""

    def is_due(self, step: int) -> bool:
        """Whether to look after `step` steps; the same on all workers."""
        ...

    def evaluate(self) -> tuple[dict[str, float], float]:
        """Numbers to log beside the losses, and the seconds that it took. Collective."""
        ...


def fit(job: TrainingJob, learner: Learner, watch: Monitor | None = None) -> None:
    """Train `learner` in place, to the end, from the newest checkpoint in the job's folder if there is one. Collective.

    Raises:
        StopTraining: on all ranks: a loss that is not finite, a full disk, no whole checkpoint left, (Stopped) a file that asks for it, or (Paused)
            the steps that were to be made for now are made.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(job, learner)
    try:
        _run_steps(job, learner, trainer, watch)
    except Exception as error:
        error.add_note(f"{STEP_NOTE_PREFIX}{trainer.done}")
        raise
    broadcast_buffers(
        learner
    )  # of `norm: batch` every worker has its own; the checkpoint, and what is handed on, has those of rank 0
    learner.eval()


def _run_steps(job: TrainingJob, learner: Learner, trainer: Trainer, watch: Monitor | None) -> None:
    step, notes = trainer.resume()
    stop = job.pause_step or job.total_steps
    if step == 0 and learner.fills_tables_first:
        _fill_tables(job, learner, trainer.rows)
    order = TrainOrder(job.plan, rank(), world_size(), step, stop)
    stream, told = open_batches(job, order, trainer.rows)
    clock, tails, first = (
        Clock(job.folder, job.plan, job.total_steps, step, job.device),
        Tails(job.folder, job.plan, step),
        step,
    )
    for line in notes + told:
        append(job.folder, {"note": line})
    for arrays in clock.waiting(stream):
        if step % job.plan.steps == 0 or step == first:
            watchdog.suspend_timer()
            learner.begin_epoch(step // job.plan.steps)
            tails.write(step // job.plan.steps)
        with time_part(DATA_PART):
            batch = to_batch(arrays, job.device, job)
        losses = trainer.step(batch, step)
        step += 1
        watchdog.send_heartbeat()
        last = step == stop
        looks = watch is not None and watch.is_due(step)
        if step % job.training.log_every == 0 or last or looks:
            seen = {}
            if watch is not None and looks:
                watchdog.suspend_timer()
                seen = clock.aside(watch.evaluate())
            clock.log(step, {**_average_losses(losses), "lr": trainer.optimizer.param_groups[0]["lr"], **seen})
            _stop_if_asked(job)
        if failures.fault_hook is not None:
            failures.fault_hook(rank(), step)
        if last or trainer.checkpoint_due(step):
            trainer.save(step)
    clock.close()
    if job.pause_step:
        raise Paused(f"{job.folder.name}: pauses after {job.pause_after_epochs} of {job.training.epochs} epochs")


@torch.no_grad()
def _fill_tables(job: TrainingJob, learner: Learner, rows: int) -> None:
    """Show the learner all batches of the first epoch."""
    append(job.folder, {"note": "all images are looked at once before the first step"})
    learner.eval()
    order = TrainOrder(job.plan, rank(), world_size(), 0, job.plan.steps)
    arriving, told = open_batches(job, order, rows)
    for line in told:
        append(job.folder, {"note": line})
    for arrays in arriving:
        learner.fill_tables(to_batch(arrays, job.device, job))
        learner.end_step()
    learner.train()


def open_batches(job: TrainingJob, order: TrainOrder, rows: int) -> tuple[Iterator[dict[str, Any]], list[str]]:
    """This worker's batches, and what the user should know of where they come from. Collective."""
    if job.loader.targets is not None:  # boxes and masks are moved one by one, where they are read
        return stream_batches(job.loader, order, rows, job.options), []
    if job.options.resident is None or len(order) == 0:
        return device_cache.iterate_streamed_batches(job.loader, order, rows, job.options, job.device), []
    held, notes = device_cache.cache_images(job.loader, job.options, job.device)
    return device_cache.iterate_cached_batches(held, job.loader, order, job.options), notes


def _stop_if_asked(job: TrainingJob) -> None:
    """Collective: a file that not all ranks see at once must not part them.

    Raises:
        Stopped: on all ranks.
    """
    file = job.folder / STOP_FILE
    why = broadcast_object(file.read_text("utf-8") if rank() == 0 and file.exists() else None)
    if why is not None:
        raise Stopped(why)


def _average_losses(losses: dict[str, Tensor]) -> dict[str, float]:
    """Averages over workers; collective."""
    return {name: float(all_sum(value.detach().double()) / world_size()) for name, value in losses.items()}

"""The training loop, shared by pretraining methods and downstream tasks. It knows only `Learner`.

The state after step k is a function of (config, seed, k) alone: batches come from the plan, every step draws its random
numbers from (seed, step, rank), and a checkpoint holds the rest. A training that is killed and continued on as many
workers ends bit-identical to one that never stopped.
"""

import contextlib
import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from firstlight.pipeline.data.stream import TrainOrder, stream_batches
from firstlight.pipeline.errors import Paused, Stopped
from firstlight.pipeline.train import device_cache, failures, watchdog
from firstlight.pipeline.train.accelerator.transfer import BatchFeed
from firstlight.pipeline.train.accelerator.utilization import UtilizationMeter
from firstlight.pipeline.train.backward_pass import choose_formats
from firstlight.pipeline.train.failures import STEP_NOTE_PREFIX
from firstlight.pipeline.train.held import budget
from firstlight.pipeline.train.metrics import DATA_PART, DroppedIds, MetricsLogger, append_row
from firstlight.pipeline.train.trainer import Trainer
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.collective import all_sum, broadcast_buffers, broadcast_object, rank, world_size
from firstlight.tasks.device.timer import time_part
from firstlight.tasks.learner import Learner

# A file in the folder of a job that asks its training to stop; its text is the reason.
STOP_FILE = "stop"


class Monitor(Protocol):
    """Evaluates the learner during the training, and leaves it as it was."""

    def is_due(self, step: int) -> bool:
        """Returns True if the learner is evaluated after `step` steps; the same on all workers."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Returns metrics to log with the losses. It is collective."""
        ...


def fit(job: TrainingJob, learner: Learner, monitor: Monitor | None = None) -> None:
    """Trains `learner` in place, to its end, from the job's newest checkpoint if there is one. It is collective.

    Raises:
        StopTraining: on all ranks: the loss is not finite, the disk is full, or every checkpoint is damaged. A step
            whose loss is not finite updates nothing, and is reported at the next log line or checkpoint at the latest.
        Stopped: on all ranks: `STOP_FILE` exists.
        Paused: on all ranks: the step at which the job pauses is reached.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(job, learner)
    try:
        with choose_formats(learner, trainer.backward.autocast_dtype, job.device):
            _run_steps(job, learner, trainer, monitor)
    except Exception as error:
        error.add_note(f"{STEP_NOTE_PREFIX}{trainer.num_done}")
        raise
    trainer.load_final_weights()
    # With `norm: batch`, workers have different running statistics. Checkpoints and exported networks have rank 0's.
    broadcast_buffers(learner)
    learner.eval()


def _run_steps(job: TrainingJob, learner: Learner, trainer: Trainer, monitor: Monitor | None) -> None:
    step, notes = trainer.resume_training()
    selection = trainer.selection
    stop = step if selection is not None and selection.is_over else job.pause_step or job.total_steps
    stretch, *later = _list_stretches(job, learner, step, stop)
    if step < stop and step % job.plan.steps == 0 and learner.reads_images_before(step // job.plan.steps):
        _read_images(job, learner, step, trainer.num_rows)
    stream, stream_notes = open_batches(job, stretch, trainer.num_rows)
    meter = UtilizationMeter(job.device, trainer.backward.autocast_dtype)
    logger = MetricsLogger(job.folder, job.plan, job.total_steps, step, job.device, meter)
    dropped, first = DroppedIds(job.folder, job.plan, step, job.total_steps), step
    for line in notes + stream_notes:
        append_row(job.folder, {"note": line})
    if monitor is not None and selection is not None and selection.options.evaluates_start and step == 0 < stop:
        found = _evaluate_weights(trainer, monitor, logger, step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        append_row(job.folder, {"note": f"before the first step: {shown}"})
    batches = _iterate_stretches(job, learner, logger, stream, later, trainer.num_rows)
    feed, preemption = BatchFeed(job.device), failures.PreemptionWatch()
    # The stream is closed, because a training may end before its stream does.
    with contextlib.closing(batches):
        for arrays in batches:
            if step % job.plan.steps == 0 or step == first:
                watchdog.suspend_timer()
                learner.begin_epoch(step // job.plan.steps)
                dropped.write_epoch(step // job.plan.steps)
            with time_part(DATA_PART):
                batch = feed.make_batch(
                    functools.partial(to_batch, arrays, job.device, job), device_cache.holds_tensors(arrays)
                )
            losses = meter.take_step(functools.partial(trainer.step, batch, step), trainer.num_rows)
            step += 1
            watchdog.send_heartbeat()
            last = step == stop
            is_evaluated = monitor is not None and monitor.is_due(step)
            if step % job.training.log_every == 0 or last or is_evaluated:
                trainer.stop_unless_finite()
                metrics = {}
                if monitor is not None and is_evaluated:
                    watchdog.suspend_timer()
                    metrics = _evaluate_weights(trainer, monitor, logger, step)
                    last = last or (selection is not None and selection.is_over)
                rate = trainer.optimizer.param_groups[0]["lr"]
                logger.log_step(step, {**_average_losses(losses), "lr": rate, **metrics})
                _stop_if_asked(job)
            if failures.fault_hook is not None:
                failures.fault_hook(rank(), step)
            notice = preemption.find_notice(step)
            if last or trainer.is_checkpoint_due(step) or notice is not None:
                trainer.save_checkpoint(step)
            if notice is not None:
                append_row(job.folder, {"note": f"{notice}: a checkpoint was written after step {step}"})
            if last and step < stop:
                append_row(job.folder, {"note": _describe_early_end(trainer, step)})
                break
    logger.close()
    if job.pause_step and step == job.pause_step:
        raise Paused(f"{job.folder.name}: pauses after {job.pause_after:,} of {job.training.length}")


def _evaluate_weights(trainer: Trainer, monitor: Monitor, logger: MetricsLogger, step: int) -> dict[str, float]:
    """Evaluates the weights after `step` steps, and keeps them if they are the best so far. It is collective.

    Returns the metrics to log.
    """
    with trainer.averaged_weights(), logger.exclude_time("looks"):
        metrics = monitor.evaluate()
    selection = trainer.selection
    if selection is not None and selection.record_evaluation(step, metrics) and selection.options.keeps_best:
        trainer.save_best(step)
    return metrics


def _describe_early_end(trainer: Trainer, step: int) -> str:
    selection, total = trainer.selection, trainer.job.total_steps
    assert selection is not None
    return (
        f"ends after step {step} of {total}: {selection.options.measure} was not better than {selection.best:.4g} of "
        f"step {selection.best_step} in {selection.num_since} evaluations"
    )


def _list_stretches(job: TrainingJob, learner: Learner, first: int, stop: int) -> list[TrainOrder]:
    """Returns this worker's order of the steps `first` .. `stop` - 1, cut where the learner reads all images."""
    epochs = range(first // job.plan.steps + 1, -(-stop // job.plan.steps))
    cuts = [epoch * job.plan.steps for epoch in epochs if learner.reads_images_before(epoch)]
    ends = pairwise([first, *cuts, stop])
    return [TrainOrder(job.plan, rank(), world_size(), start, end) for start, end in ends]


def _iterate_stretches(
    job: TrainingJob,
    learner: Learner,
    logger: MetricsLogger,
    stream: Iterator[dict[str, Any]],
    later: Sequence[TrainOrder],
    rows: int,
) -> Generator[dict[str, Any], None, None]:
    """Yields the batches of `stream`, then those of the stretches `later`, before each of which the learner reads all
    images. One stream is open at a time.
    """
    yield from logger.time_waits(stream)
    for stretch in later:
        with logger.exclude_time():
            watchdog.suspend_timer()
            _read_images(job, learner, stretch.start, rows)
            stream, _ = open_batches(job, stretch, rows)
        yield from logger.time_waits(stream)


@torch.no_grad()
def _read_images(job: TrainingJob, learner: Learner, step: int, rows: int) -> None:
    """Passes all batches of the epoch that begins at `step` to the learner's tables. It is collective."""
    append_row(job.folder, {"note": f"all images are read once before epoch {step // job.plan.steps + 1}"})
    # With `norm: batch`, workers have different running statistics. A checkpoint has rank 0's.
    broadcast_buffers(learner)
    learner.eval()
    order = TrainOrder(job.plan, rank(), world_size(), step, step + job.plan.steps)
    stream, notes = open_batches(job, order, rows)
    for line in notes:
        append_row(job.folder, {"note": line})
    for arrays in stream:
        learner.fill_tables(to_batch(arrays, job.device, job))
        learner.end_step()
    learner.train()


def open_batches(job: TrainingJob, order: TrainOrder, rows: int) -> tuple[Iterator[dict[str, Any]], list[str]]:
    """Returns this worker's batches, and notes about where they come from. It is collective."""
    # Boxes and masks are transformed image by image, where they are read.
    if job.loader.targets is not None:
        return stream_batches(job.loader, order, rows, job.options), []
    ids = budget.choose_held_ids(job.loader.store, job.options, job.plan)
    if ids is None or len(order) == 0:
        return device_cache.iterate_streamed_batches(job.loader, order, rows, job.options, job.device), []
    held, notes = device_cache.cache_images(job.loader, replace(job.options, resident=ids), job.device)
    return device_cache.iterate_cached_batches(held, job.loader, order, job.options), notes


def _stop_if_asked(job: TrainingJob) -> None:
    """Stops the training if `STOP_FILE` exists. It is collective, as not all ranks may see the file at the same time.

    Raises:
        Stopped: on all ranks, with the text of the file.
    """
    file = job.folder / STOP_FILE
    why = broadcast_object(file.read_text("utf-8") if rank() == 0 and file.exists() else None)
    if why is not None:
        raise Stopped(why)


def _average_losses(losses: dict[str, Tensor]) -> dict[str, float]:
    """Returns the losses averaged over workers. It is collective."""
    return {name: float(all_sum(value.detach().double()) / world_size()) for name, value in losses.items()}

"""Training steps on several workers, compared with the same steps on one: what all learners promise the loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.learner import Batch, Learner
from tests.support.gloo import Pool


@dataclass(frozen=True)
class StepResult:
    """The state of one worker after its steps."""

    # The losses and other logged values of the last step, of this worker's part of the batch.
    losses: dict[str, Tensor]
    # The gradients of the last step, averaged over workers, by parameter.
    gradients: dict[str, Tensor]
    # The whole tables and the buffers after the last step.
    tables: dict[str, Tensor]
    buffers: dict[str, Tensor]


def split_batch(batch: Batch, workers: int) -> list[Batch]:
    """The parts of a global batch that the workers hold, in rank order."""
    size = len(batch.ids) // workers
    return [batch.select_range(k * size, (k + 1) * size) for k in range(workers)]


def take_steps(build: Callable[[], Learner], batches: Sequence[Batch], epoch: int = 0) -> StepResult:
    """Takes a step in `epoch` on this worker's part of each global batch, without an optimiser."""
    learner = build().train()
    learner.begin_epoch(epoch)
    model = DistributedDataParallel(learner) if world_size() > 1 else learner
    losses: dict[str, Tensor] = {}
    for step, batch in enumerate(batches):
        learner.zero_grad()
        learner.begin_step(step)
        losses = model(split_batch(batch, world_size())[rank()])
        losses["loss"].backward()
        learner.end_step()
    return StepResult(
        {name: value.detach() for name, value in losses.items()},
        {name: p.grad for name, p in learner.named_parameters() if p.grad is not None},
        {name: table.read(torch.arange(table.size)) for name, table in learner.tables.items()},
        dict(learner.named_buffers()),
    )


def assert_workers_equal_one(
    pool: Pool,
    build: Callable[[], Learner],
    *batches: Batch,
    epoch: int = 0,
    loss_rtol: float = 1e-10,
    atol: float = 1e-12,
) -> StepResult:
    """Asserts that steps on the workers of `pool` equal steps on one. Returns the result of one worker.

    The losses are equal on average over workers; gradients, tables and buffers on every worker. `build` must be
    importable: a function of a module, or a `functools.partial` of one.
    """
    one = take_steps(build, batches, epoch)
    answers: list[StepResult] = pool.run(take_steps, build, batches, epoch)
    for name, value in one.losses.items():
        mean = math.fsum(float(answer.losses[name]) for answer in answers) / len(answers)
        # Shares of images are computed in single precision.
        rel = loss_rtol if value.dtype == torch.float64 else 1e-6
        assert mean == pytest.approx(float(value), rel=rel), name
    for answer in answers:
        for found, expected in (
            (answer.gradients, one.gradients),
            (answer.tables, one.tables),
            (answer.buffers, one.buffers),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=atol)
    return one

"""The few collectives that methods, tables and the loop need. Every one is the identity on a single worker."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from firstlight.tasks.timer import part

COMMUNICATION = "communication"  # what the workers' exchanges are called, by the clock


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """(B, ...) on every rank -> (world * B, ...), rank order, with gradient: rank r receives the gradient of its own rows, summed over ranks.

    All ranks must hold the same B.
    """
    return _Gather.apply(x) if world() > 1 else x  # type: ignore[no-untyped-call,no-any-return]


def all_sum(x: Tensor) -> Tensor:
    """The sum over ranks, with gradient (the gradient of a sum is the sum of the gradients)."""
    return _AllSum.apply(x) if world() > 1 else x  # type: ignore[no-untyped-call,no-any-return]


def shared_count(known: Tensor, dtype: torch.dtype) -> Tensor:
    """What a worker divides its sum over its `known` (bool, any shape) by, so that the mean over workers is that of all that is known; never 0."""
    return all_sum(known.sum()).clamp_min(1).to(dtype) / world()


def mine(x: Tensor) -> Tensor:
    """(world * B, ...) -> the B rows of this rank."""
    size = len(x) // world()
    return x[rank() * size : (rank() + 1) * size]


def from_rank_zero(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """`function(*arguments)`, computed on rank 0 only. The result is (G,) int64 with G the length of the first argument."""
    if world() == 1:
        return function(*arguments)
    result = (
        function(*arguments)
        if rank() == 0
        else torch.empty(len(arguments[0]), dtype=torch.int64, device=arguments[0].device)
    )
    with part(COMMUNICATION):
        dist.broadcast(result, src=0)
    return result


def broadcast_object(value: Any, source: int = 0) -> Any:
    """A small picklable value of rank `source`, on every rank. Between the workers of one run only: nothing is read from disk."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's small picklable value, in rank order, on every rank."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
    return box


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Rank 0's buffers, such as running statistics of batch normalisation, on every rank."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    if world() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        with part(COMMUNICATION):
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        with part(COMMUNICATION):
            dist.all_reduce(total)
        return mine(total)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        with part(COMMUNICATION):
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        with part(COMMUNICATION):
            dist.all_reduce(total)
        return total

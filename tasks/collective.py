"""The collectives of methods, tables and the training loop. Each one is the identity on a single worker."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from firstlight.tasks.device.timer import time_part

# The name under which the step timer counts the exchanges between workers.
COMMUNICATION = "communication"


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather_over_workers(x: Tensor) -> Tensor:
    """Concatenates the (B, ...) tensors of all ranks to (world * B, ...), in rank order, with gradient.

    Rank r receives the gradient of its own rows, summed over ranks. B must be the same on all ranks.
    """
    return _Gather.apply(x) if world_size() > 1 else x  # type: ignore[no-untyped-call,no-any-return]


def all_sum(x: Tensor) -> Tensor:
    """Returns the sum over ranks, with gradient (the gradient of a sum is the sum of the gradients)."""
    return _AllSum.apply(x) if world_size() > 1 else x  # type: ignore[no-untyped-call,no-any-return]


def mean_count_per_worker(known: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mean over workers of the number of true elements of `known` (bool, any shape), never 0.

    A worker that divides its sum over its known elements by it has a part of the mean over the known elements of all
    workers: the average of the parts over workers is that mean.
    """
    return all_sum(known.sum()).clamp_min(1).to(dtype) / world_size()


def select_own_rows(x: Tensor) -> Tensor:
    """Returns the (B, ...) rows of this rank out of (world * B, ...)."""
    size = len(x) // world_size()
    return x[rank() * size : (rank() + 1) * size]


def compute_on_rank_zero(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Computes `function(*arguments)` on rank 0 only, and returns the result on every rank.

    The result is (G,) int64 with G the length of the first argument.
    """
    if world_size() == 1:
        return function(*arguments)
    result = (
        function(*arguments)
        if rank() == 0
        else torch.empty(len(arguments[0]), dtype=torch.int64, device=arguments[0].device)
    )
    with time_part(COMMUNICATION):
        dist.broadcast(result, src=0)
    return result


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Returns the small picklable value of rank `source` on every rank.

    It passes between the workers of one run only: nothing is unpickled from disk.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def broadcast_tensor(value: Tensor | None, device: torch.device) -> Tensor:
    """Returns the tensor of rank 0 on every rank, on the device of each. Other ranks give None."""
    if world_size() == 1:
        assert value is not None
        return value.to(device)
    shape, dtype = broadcast_object(None if value is None else (tuple(value.shape), value.dtype))
    found = torch.empty(shape, dtype=dtype, device=device) if value is None else value.to(device).contiguous()
    dist.broadcast(found, src=0)
    return found


def gather_objects(value: Any) -> list[Any]:
    """Returns the small picklable values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Copies rank 0's buffers, such as running statistics of batch normalisation, to every rank."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        with time_part(COMMUNICATION):
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        with time_part(COMMUNICATION):
            dist.all_reduce(total)
        return select_own_rows(total)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        with time_part(COMMUNICATION):
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        with time_part(COMMUNICATION):
            dist.all_reduce(total)
        return total

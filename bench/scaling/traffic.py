"""The collectives of a step, recorded as the code of the methods calls them, in a simulated world.

There, the part of a worker in the batch is a small images. A collective carries a constant and a number of bytes for
each image, so two such steps determine what any batch would carry. The only formulas are those of a ring
(`count_sent_bytes`) and of DistributedDataParallel (`list_gradient_messages`).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from firstlight.tasks.learner import Batch
from firstlight.tasks.memory_bank import NEIGHBOUR_QUERY_BLOCK, MemoryBank
from firstlight.tasks.pretrain.method import Method

# Rank 0 would also solve assignments
SIMULATED_RANK = 1
# Images of a worker in the two steps that are traced
SMALL_STEP_ROWS, LARGE_STEP_ROWS = 2, 4
# Bytes that the training loop itself sums in a step, to check that the loss is finite
LOOP_BYTES = 16


@dataclass(frozen=True)
class CollectiveMessage:
    """One collective. `payload` is the bytes that a worker contributes; for a broadcast, those of its source."""

    kind: Literal["all_reduce", "all_gather", "broadcast"]
    payload: int

    def count_sent_bytes(self, world: int) -> int:
        """Returns the bytes that a worker sends, on a ring or down a chain."""
        if self.kind == "all_reduce":
            return 2 * (world - 1) * self.payload // world
        return (world - 1) * self.payload if self.kind == "all_gather" else self.payload

    def count_result_bytes(self, world: int) -> int:
        """Returns the bytes of the result on a worker."""
        return world * self.payload if self.kind == "all_gather" else self.payload

    def count_hops(self, world: int) -> int:
        """Returns how many messages must arrive one after the other, in a tree."""
        depth = math.ceil(math.log2(world))
        return 2 * depth if self.kind == "all_reduce" else depth


@contextlib.contextmanager
def record_collectives(perform: Mapping[str, Callable[..., Any]]) -> Iterator[list[CollectiveMessage]]:
    """Yields a list to which every collective call is added.

    `perform` has the functions that carry the calls out, by name.
    """
    seen: list[CollectiveMessage] = []

    def all_reduce(tensor: Tensor, *rest: Any) -> Any:
        seen.append(CollectiveMessage("all_reduce", tensor.nbytes))
        return perform["all_reduce"](tensor, *rest)

    def all_gather(parts: list[Tensor], tensor: Tensor) -> Any:
        seen.append(CollectiveMessage("all_gather", tensor.nbytes))
        return perform["all_gather"](parts, tensor)

    def broadcast(tensor: Tensor, src: int) -> Any:
        seen.append(CollectiveMessage("broadcast", tensor.nbytes))
        return perform["broadcast"](tensor, src=src)

    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather, broadcast=broadcast):
        yield seen


def get_real_collectives() -> dict[str, Callable[..., Any]]:
    """Returns the collectives of torch.distributed by name."""
    return {"all_reduce": dist.all_reduce, "all_gather": dist.all_gather, "broadcast": dist.broadcast}


def _make_simulated_collectives(size: int) -> dict[str, Callable[..., Any]]:
    """Returns collectives that send nothing and fill in ids of the other ranks, and zeros."""

    def all_gather(parts: list[Tensor], tensor: Tensor) -> None:
        for rank, into in enumerate(parts):
            into.copy_(
                (tensor + (rank - SIMULATED_RANK) * len(tensor)) % size if tensor.dtype == torch.int64 else tensor
            )

    def broadcast(tensor: Tensor, src: int) -> None:
        tensor.copy_(torch.arange(len(tensor)) if tensor.dtype == torch.int64 else torch.zeros_like(tensor))

    return {"all_reduce": lambda tensor, *rest: None, "all_gather": all_gather, "broadcast": broadcast}


@contextlib.contextmanager
def simulate_world(world: int) -> Iterator[None]:
    """Makes this process one of `world` workers. Nothing is sent."""
    with mock.patch.multiple(
        dist, is_initialized=lambda: True, get_world_size=lambda: world, get_rank=lambda: SIMULATED_RANK
    ):
        yield


def make_worker_batch(rows: int, rank: int, image_size: int, views: int = 2) -> Batch:
    """Returns the part of a rank in a batch of grey images; its ids follow those of the rank before."""
    ids = torch.arange(rows) + rank * rows
    return Batch(
        ids,
        ids,
        torch.full_like(ids, -1),
        (torch.rand(rows, 3, image_size, image_size),) * views,
        torch.zeros_like(ids),
    )


def run_step(method: Method, batch: Batch) -> None:
    """Runs loss, gradient and writes of a batch like the loop, without DistributedDataParallel and the optimiser."""
    method.loss(method.embed(batch), batch)["loss"].backward()  # type: ignore[no-untyped-call]
    method.end_step()


def simulate_step(build: Callable[[int], Method], world: int, rows: int, image_size: int) -> list[CollectiveMessage]:
    """Returns what a worker's step of `rows` images exchanges for the method that `build(size)` makes.

    The gradients are not included. The step is of an epoch that exchanges targets.
    """
    size = world * LARGE_STEP_ROWS
    with simulate_world(world):
        method = build(size)
        small, large = (
            _trace_step(method, size, make_worker_batch(count, SIMULATED_RANK, image_size))
            for count in (SMALL_STEP_ROWS, LARGE_STEP_ROWS)
        )
    return [*scale_messages(small, large, rows), CollectiveMessage("all_reduce", LOOP_BYTES)]


def _trace_step(method: Method, size: int, batch: Batch) -> list[CollectiveMessage]:
    with record_collectives(_make_simulated_collectives(size)) as seen:
        run_step(method, batch)
    return seen


def scale_messages(
    small: Sequence[CollectiveMessage], large: Sequence[CollectiveMessage], rows: int
) -> list[CollectiveMessage]:
    """Returns the messages of `rows` images, from those of SMALL_STEP_ROWS and of LARGE_STEP_ROWS."""
    assert [message.kind for message in small] == [message.kind for message in large]
    slopes = [(b.payload - a.payload) // (LARGE_STEP_ROWS - SMALL_STEP_ROWS) for a, b in zip(small, large, strict=True)]
    return [
        CollectiveMessage(a.kind, a.payload + slope * (rows - SMALL_STEP_ROWS))
        for a, slope in zip(small, slopes, strict=True)
    ]


def list_gradient_messages(method: nn.Module) -> list[CollectiveMessage]:
    """Returns what DistributedDataParallel sends: gradients, and the buffers of rank 0 before each step."""
    buffers = sum(buffer.nbytes for buffer in method.buffers())
    gradients = sum(parameter.nbytes for parameter in method.parameters() if parameter.requires_grad)
    return [*([CollectiveMessage("broadcast", buffers)] if buffers else []), CollectiveMessage("all_reduce", gradients)]


def simulate_discovery(dim: int, size: int, world: int) -> tuple[int, list[CollectiveMessage]]:
    """Returns how many blocks of queries find the neighbours of all rows of a bank, and what each block exchanges.

    See `MemoryBank.find_neighbours`.
    """
    blocks = sum(-(-len(range(rank, size, world)) // NEIGHBOUR_QUERY_BLOCK) for rank in range(world))
    found = []
    for count in (SMALL_STEP_ROWS, LARGE_STEP_ROWS):
        with simulate_world(world), record_collectives(_make_simulated_collectives(world * count)) as seen:
            MemoryBank(world * count, dim, 0, 8192).find_neighbours(0.1)
        found.append(seen[: len(seen) // world])
    return blocks, scale_messages(found[0], found[1], NEIGHBOUR_QUERY_BLOCK)

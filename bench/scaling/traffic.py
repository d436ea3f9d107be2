"""The collectives of a step: those that the methods' own code calls, written down as it calls them, in a world that is only pretended.

A worker's part of the batch is a few images there. What a collective carries is a constant and a number of bytes for each image, so two such
steps tell what any batch would carry. Every formula that is left is that of a ring (`sent`), and of DistributedDataParallel (`of_gradients`).
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
from firstlight.tasks.memory_bank import QUERIES, MemoryBank
from firstlight.tasks.pretrain.method import Method

RANK = 1  # that is pretended: rank 0 solves assignments beside
FEW, MORE = 2, 4  # images of a worker in the two steps that are traced
LOOP = 16  # bytes that the training loop itself sums in a step: whether the loss is a finite number (`fit._stop_unless_finite`)


@dataclass(frozen=True)
class Message:
    """One collective. `payload`: bytes that a worker hands over; of a broadcast, those of its source."""

    kind: Literal["all_reduce", "all_gather", "broadcast"]
    payload: int

    def sent(self, world: int) -> int:
        """Bytes that a worker sends, on a ring, or down a chain."""
        if self.kind == "all_reduce":
            return 2 * (world - 1) * self.payload // world
        return (world - 1) * self.payload if self.kind == "all_gather" else self.payload

    def result(self, world: int) -> int:
        """Bytes of what a worker then holds."""
        return world * self.payload if self.kind == "all_gather" else self.payload

    def hops(self, world: int) -> int:
        """Times that a message must arrive before the next can be sent, in a tree."""
        depth = math.ceil(math.log2(world))
        return 2 * depth if self.kind == "all_reduce" else depth


@contextlib.contextmanager
def recorded(perform: Mapping[str, Callable[..., Any]]) -> Iterator[list[Message]]:
    """Write down the collectives that are called; `perform`: what then does them, by name."""
    seen: list[Message] = []

    def all_reduce(tensor: Tensor, *rest: Any) -> Any:
        seen.append(Message("all_reduce", tensor.nbytes))
        return perform["all_reduce"](tensor, *rest)

    def all_gather(parts: list[Tensor], tensor: Tensor) -> Any:
        seen.append(Message("all_gather", tensor.nbytes))
        return perform["all_gather"](parts, tensor)

    def broadcast(tensor: Tensor, src: int) -> Any:
        seen.append(Message("broadcast", tensor.nbytes))
        return perform["broadcast"](tensor, src=src)

    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather, broadcast=broadcast):
        yield seen


def truly() -> dict[str, Callable[..., Any]]:
    """The collectives as they are."""
    return {"all_reduce": dist.all_reduce, "all_gather": dist.all_gather, "broadcast": dist.broadcast}


def _pretended(size: int) -> dict[str, Callable[..., Any]]:
    """Others that send what keeps the code going: ids of their own, and zeros."""

    def all_gather(parts: list[Tensor], tensor: Tensor) -> None:
        for rank, into in enumerate(parts):
            into.copy_((tensor + (rank - RANK) * len(tensor)) % size if tensor.dtype == torch.int64 else tensor)

    def broadcast(tensor: Tensor, src: int) -> None:
        tensor.copy_(torch.arange(len(tensor)) if tensor.dtype == torch.int64 else torch.zeros_like(tensor))

    return {"all_reduce": lambda tensor, *rest: None, "all_gather": all_gather, "broadcast": broadcast}


@contextlib.contextmanager
def pretended(world: int) -> Iterator[None]:
    """This process is one of `world`; nothing is sent."""
    with mock.patch.multiple(dist, is_initialized=lambda: True, get_world_size=lambda: world, get_rank=lambda: RANK):
        yield


def images(rows: int, rank: int, image_size: int, views: int = 2) -> Batch:
    """A worker's part of a batch, of grey images: the ids follow those of the rank before."""
    ids = torch.arange(rows) + rank * rows
    return Batch(
        ids,
        ids,
        torch.full_like(ids, -1),
        (torch.rand(rows, 3, image_size, image_size),) * views,
        torch.zeros_like(ids),
    )


def step(method: Method, batch: Batch) -> None:
    """Loss, gradient and writes of a batch, as the loop does them, but for DistributedDataParallel and the optimiser."""
    method.loss(method.embed(batch), batch)["loss"].backward()  # type: ignore[no-untyped-call]
    method.end_step()


def of_step(build: Callable[[int], Method], world: int, rows: int, image_size: int) -> list[Message]:
    """What a worker's step of `rows` images exchanges for the method that `build(size)` makes; without the gradients, of an epoch that exchanges
    targets."""
    size = world * MORE
    with pretended(world):
        method = build(size)
        few, more = (_traced(method, size, images(count, RANK, image_size)) for count in (FEW, MORE))
    return [*scaled(few, more, rows), Message("all_reduce", LOOP)]


def _traced(method: Method, size: int, batch: Batch) -> list[Message]:
    with recorded(_pretended(size)) as seen:
        step(method, batch)
    return seen


def scaled(few: Sequence[Message], more: Sequence[Message], rows: int) -> list[Message]:
    """The messages of `rows` images, from those of FEW and of MORE."""
    assert [message.kind for message in few] == [message.kind for message in more]
    slopes = [(b.payload - a.payload) // (MORE - FEW) for a, b in zip(few, more, strict=True)]
    return [Message(a.kind, a.payload + slope * (rows - FEW)) for a, slope in zip(few, slopes, strict=True)]


def of_gradients(method: nn.Module) -> list[Message]:
    """DistributedDataParallel: the gradients of what is trained, and rank 0's buffers before each step."""
    buffers = sum(buffer.nbytes for buffer in method.buffers())
    gradients = sum(parameter.nbytes for parameter in method.parameters() if parameter.requires_grad)
    return [*([Message("broadcast", buffers)] if buffers else []), Message("all_reduce", gradients)]


def of_discovery(dim: int, size: int, world: int) -> tuple[int, list[Message]]:
    """Finding the neighbours of all rows of a bank (`MemoryBank.discover`): how many blocks of queries, and what each of them exchanges."""
    blocks = sum(-(-len(range(rank, size, world)) // QUERIES) for rank in range(world))
    found = []
    for count in (FEW, MORE):
        with pretended(world), recorded(_pretended(world * count)) as seen:
            MemoryBank(world * count, dim, 0, 8192).discover(0.1)
        found.append(seen[: len(seen) // world])
    return blocks, scaled(found[0], found[1], QUERIES)

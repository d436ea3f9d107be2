"""Seconds of a step, at stated speeds: of the networks, of the wire, of storage, and of the work that grows with all images or with the batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.scaling.traffic import Message

COST = 8  # bytes of an entry of the matrix of costs, which has a row and a column for each image
ASSIGNMENT = (
    4096,
    3.7,
    2.2,
)  # images, seconds of one core for `best_assignment` of them, and the power that time grows with, measured up to there


@dataclass(frozen=True)
class Network:
    """`bandwidth`: bytes a worker can send in a second while all others do; `latency`: seconds until a message arrives."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, messages: Sequence[Message], world: int) -> float:
        return (
            sum(m.sent(world) / self.bandwidth + m.hops(world) * self.latency for m in messages) if world > 1 else 0.0
        )


NETWORKS = (Network("NVLink", 300e9, 5e-6), Network("100 GbE", 12.5e9, 20e-6), Network("10 GbE", 1.25e9, 50e-6))


@dataclass(frozen=True)
class Machine:
    """Of a worker. `images`: that its device trains on in a second, networks alone; `flops`: of matrix products of float32; `read`: bytes of encoded
    images that it gets from storage in a second."""

    images: float
    flops: float
    read: float


def assignment(images: int) -> float:
    """Seconds to find the best assignment of a batch: one core, on one worker; the others wait. Of random features; the worst grow with the cube."""
    known, seconds, power = ASSIGNMENT
    return float(seconds * (images / known) ** power)


def pass_over_bank(queries: int, rows: int, dim: int) -> float:
    """Floating point operations of the three matrix products of `MemoryBank.moments`, of all queries against a worker's rows."""
    return 3 * 2.0 * queries * rows * dim


def discovery(size: int, rows: int, dim: int) -> float:
    """Floating point operations of `MemoryBank.discover`: all rows against a worker's."""
    return 2.0 * size * rows * dim

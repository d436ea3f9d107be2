"""Seconds of a step at stated speeds.

They are those of the networks, of communication, of storage, and of the work that grows with all images or with the
batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.scaling.traffic import CollectiveMessage

# An entry of the cost matrix, which has a row and a column for each image
COST_ENTRY_BYTES = 8
# Images, seconds of one core for `best_assignment` of them, and the power by which the time grows, as measured up to
# there
MEASURED_ASSIGNMENT = (4096, 3.7, 2.2)


@dataclass(frozen=True)
class NetworkSpeed:
    """The speed of a network.

    `bandwidth` is the bytes that a worker can send in a second while all others do; `latency` is the seconds until a
    message arrives.
    """

    name: str
    bandwidth: float
    latency: float

    def estimate_seconds(self, messages: Sequence[CollectiveMessage], world: int) -> float:
        """Returns the seconds that a step waits for the messages in a world of `world` workers."""
        return (
            sum(m.count_sent_bytes(world) / self.bandwidth + m.count_hops(world) * self.latency for m in messages)
            if world > 1
            else 0.0
        )


NETWORKS = (
    NetworkSpeed("NVLink", 300e9, 5e-6),
    NetworkSpeed("100 GbE", 12.5e9, 20e-6),
    NetworkSpeed("10 GbE", 1.25e9, 50e-6),
)


@dataclass(frozen=True)
class WorkerSpeed:
    """The speed of a worker.

    Attributes:
        images_per_s: images that its device trains on in a second, networks alone.
        flops: floating point operations a second of matrix products of float32.
        read_bytes_per_s: bytes of encoded images that it gets from storage in a second.
    """

    images_per_s: float
    flops: float
    read_bytes_per_s: float


def estimate_assignment_seconds(images: int) -> float:
    """Returns the seconds to find the best assignment of a batch, on one core of one worker while the others wait.

    They hold for random features; the worst features take a time that grows with the cube of the batch.
    """
    known, seconds, power = MEASURED_ASSIGNMENT
    return float(seconds * (images / known) ** power)


def count_bank_flops(queries: int, rows: int, dim: int) -> float:
    """Returns the operations of the three matrix products of `MemoryBank.contrast_others`.

    All queries meet the rows of one worker.
    """
    return 3 * 2.0 * queries * rows * dim


def count_discovery_flops(size: int, rows: int, dim: int) -> float:
    """Returns the operations of `MemoryBank.find_neighbours`: all rows meet the rows of one worker."""
    return 2.0 * size * rows * dim

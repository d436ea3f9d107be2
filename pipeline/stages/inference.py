"""Ids -> what a network says of their images, by Ray Data batch inference (decoding tasks feed a pool of actors), or in this process.

A row of the dataset is a whole batch, so that neither the blocks nor the number of actors decide what is in a batch, and with it no bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from firstlight.pipeline.data.stream import Arrays, Loader, numbered_rows, prefetched

Network = Callable[[np.ndarray], np.ndarray]  # (B, S, S, 3) uint8 -> (B, ...)


@dataclass(frozen=True)
class Actors:
    """Ray's side of it: the actors that hold the network, and the tasks that decode for all of them."""

    count: int
    cpus: float
    gpus: float
    tasks: int
    task_cpus: float


@dataclass(frozen=True)
class Parts:
    """The batches, each (B,) ids, and how they become pixels."""

    loader: Loader
    ids: Sequence[np.ndarray]

    def load(self, index: int) -> np.ndarray:
        """(B, S, S, 3) uint8, the first view."""
        ids = self.ids[index]
        views: np.ndarray = self.loader.once(ids)["views"][:, 0]
        return views

    @property
    def bytes(self) -> int:
        """Pixels of the largest batch."""
        return max(map(len, self.ids)) * self.loader.row_bytes


def answers(parts: Parts, make: Callable[[], Network], actors: Actors | None, prefetch: int) -> Iterator[np.ndarray]:
    """The (B, ...) answers of the network that `make` builds, batch by batch, in order. `actors` None: in this process."""
    if not parts.ids:
        return
    if actors is not None:
        yield from _on_ray(parts, make, actors, prefetch)
        return
    network = make()
    for loaded in prefetched(({"views": parts.load(index)} for index in range(len(parts.ids))), prefetch):
        yield network(loaded["views"])


class _Actor:
    """Holds the network. Pixels and answers travel as bytes: batches differ in length."""

    def __init__(self, make: Callable[[], Network], size: int) -> None:
        self.network, self.size = make(), size

    def __call__(self, rows: Arrays) -> dict[str, Any]:
        found = [
            self.network(np.frombuffer(views, np.uint8).reshape(-1, self.size, self.size, 3)) for views in rows["views"]
        ]
        return {
            "batch": rows["batch"],
            "answer": [answer.tobytes() for answer in found],
            "type": [answer.dtype.str for answer in found],
        }


def _on_ray(parts: Parts, make: Callable[[], Network], actors: Actors, prefetch: int) -> Iterator[np.ndarray]:
    """Raises RuntimeError: an answer came out of order (a defect, never a user's mistake)."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = max(parts.bytes, 1)

    def load(rows: Arrays) -> Iterator[dict[str, Any]]:
        for index in rows["id"].tolist():
            yield {"batch": [index], "views": [parts.load(index).tobytes()]}

    decoded = numbered_rows(len(parts.ids)).map_batches_internal(
        load,
        batch_size=None,
        num_cpus=actors.task_cpus,
        compute=ray.data.TaskPoolStrategy(size=min(actors.tasks, len(parts.ids))),
        max_retries=2,  # Ray's default repeats a crashing task for ever
    )
    answered = decoded.map_batches_internal(
        _Actor,
        fn_constructor_args=(make, parts.loader.size),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors.count),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus or None,
        max_restarts=0,  # and for ever starts an actor that dies; whoever asked begins again behind what is done
    )
    for index, row in enumerate(answered.iter_rows()):
        if row["batch"] != index:
            raise RuntimeError(f"the answers are out of order: batch {row['batch']} came in the place of {index}")
        yield np.frombuffer(row["answer"], row["type"]).reshape(len(parts.ids[index]), -1)

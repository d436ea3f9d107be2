"""Store -> batches, in the order of a plan, loaded by Ray Data or by threads of this process.

The unit of work is a task: a window of the plan, of which one rank's part of every batch is loaded. Every rank runs its
own execution over its own part. Ray's `streaming_split` would neither keep the batches the same for 1 and 2 workers,
nor deliver every image once.
"""

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import numpy as np

from firstlight.pipeline.data import ray_data
from firstlight.pipeline.data.loader import Arrays, PixelLoader, read_encoded_images
from firstlight.pipeline.data.plan import TrainingPlan

# (B,) ids, (B,) passes
BatchRows = tuple[np.ndarray, np.ndarray]
# A block is what travels between processes: large ones delay the first batch.
MAX_BLOCK_ROWS, MAX_BLOCK_BYTES = 1024, 16_000_000
# The fewest images of a batch that a thread loads: with fewer, Python's global lock takes the time.
MIN_THREAD_IMAGES = 8
Item = TypeVar("Item")


class BatchOrder(Protocol):
    """The batches of one rank, grouped in tasks: the batches of a task are read together."""

    def __len__(self) -> int:
        """Returns the number of tasks."""
        ...

    def list_batches(self, index: int) -> list[BatchRows]:
        """Returns ids and passes of each of this rank's batches in a task."""
        ...


@dataclass(frozen=True)
class TrainOrder:
    """A rank's part of the steps `start` .. `stop` - 1 of a plan; steps are counted over all epochs."""

    plan: TrainingPlan
    rank: int
    world: int
    start: int
    stop: int

    @property
    def _task_steps(self) -> int:
        return self.plan.count_task_steps(self.world)

    @property
    def _tasks_per_epoch(self) -> int:
        return -(-self.plan.steps // self._task_steps)

    @property
    def _first_task(self) -> int:
        epoch, step = divmod(self.start, self.plan.steps)
        return epoch * self._tasks_per_epoch + step // self._task_steps

    def __len__(self) -> int:
        if self.start >= self.stop:
            return 0
        epoch, step = divmod(self.stop - 1, self.plan.steps)
        return epoch * self._tasks_per_epoch + step // self._task_steps + 1 - self._first_task

    def list_batches(self, index: int) -> list[BatchRows]:
        epoch, task = divmod(self._first_task + index, self._tasks_per_epoch)
        base = epoch * self.plan.steps
        first = task * self._task_steps
        steps = range(first, min(first + self._task_steps, self.plan.steps))
        return [self.plan.slice(epoch, s, self.rank, self.world) for s in steps if self.start <= base + s < self.stop]


@dataclass(frozen=True)
class EvalOrder:
    """A rank's part of `ids` in their order: the `rank`-th of `world` equal parts. All images are in pass 0."""

    ids: np.ndarray
    batch_size: int
    rank: int
    world: int
    batches_per_task: int = 4

    @property
    def own_ids(self) -> np.ndarray:
        return np.array_split(self.ids, self.world)[self.rank]

    def __len__(self) -> int:
        return -(-len(self.own_ids) // (self.batch_size * self.batches_per_task))

    def list_batches(self, index: int) -> list[BatchRows]:
        size = self.batch_size * self.batches_per_task
        ids = self.own_ids[index * size :][:size]
        parts = [ids[k : k + self.batch_size] for k in range(0, len(ids), self.batch_size)]
        return [(part, np.zeros(len(part), np.int64)) for part in parts]


@dataclass(frozen=True)
class LoadingOptions:
    """Options of loading batches: the section `stream` of a recipe, and what was decided from it."""

    on_ray: bool
    # Number of batches that are loaded ahead.
    prefetch: int
    # Number of decoding tasks at a time: of Ray, with the CPUs of each, or threads of this process.
    tasks: int
    task_cpus: float
    # Sorted ids whose images trainings cache decoded on their device; None if trainings stream their images.
    resident: np.ndarray | None = field(default=None, compare=False)
    # True if streamed images of a training are augmented on its device; if they differ in size, after their crop.
    on_device: bool = False
    # The largest number of bytes of images of several sizes that a training may hold decoded; 0: it streams them.
    held_bytes: int = 0
    # The same for views of images outside of trainings, which are the same each time.
    held_view_bytes: int = 0


def stream_batches(
    loader: PixelLoader, order: BatchOrder, batch_size: int, options: LoadingOptions
) -> Iterator[Arrays]:
    """Yields the batches of one rank in order. All have `batch_size` images, except the last of an `EvalOrder`.

    Raises:
        RuntimeError: a batch does not have the ids of the plan (a defect, never a user's mistake).
    """
    if len(order) == 0:
        return
    loaded = (
        _load_on_ray(loader, order, batch_size, options)
        if options.on_ray
        else prefetch_items(_load_in_process(loader, order, options.tasks), options.prefetch)
    )
    planned = (ids for index in range(len(order)) for ids, _ in order.list_batches(index))
    for ids, batch in zip_longest(planned, loaded):
        if ids is None or batch is None or not np.array_equal(ids, batch["id"]):
            received = None if batch is None else batch["id"]
            expected, found = (None if x is None else x[:4].tolist() for x in (ids, received))
            raise RuntimeError(f"the stream is out of order: planned ids are {expected}..., received ids {found}...")
        yield batch


def _load_task(loader: PixelLoader, order: BatchOrder, index: int) -> Iterator[Arrays]:
    batches = order.list_batches(index)
    encoded = read_encoded_images(loader.store, np.concatenate([ids for ids, _ in batches]))
    for ids, passes in batches:
        yield loader.load(ids, passes, encoded)


def _load_in_process(loader: PixelLoader, order: BatchOrder, threads: int) -> Iterator[Arrays]:
    """Yields the batches of all tasks. Several threads load parts of them at a time: an image's pixels are those that
    it has in a whole batch.
    """
    for parts in call_in_threads(_list_part_calls(loader, order, threads), threads):
        yield parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _list_part_calls(loader: PixelLoader, order: BatchOrder, threads: int) -> Iterator[list[Callable[[], Arrays]]]:
    """Yields the calls that load the parts of each batch."""
    for index in range(len(order)):
        batches = order.list_batches(index)
        encoded = read_encoded_images(loader.store, np.concatenate([ids for ids, _ in batches]))
        for ids, passes in batches:
            count = max(min(threads, -(-len(ids) // MIN_THREAD_IMAGES)), 1)
            shares = zip(np.array_split(ids, count), np.array_split(passes, count), strict=True)
            yield [functools.partial(loader.load, *share, encoded) for share in shares]


def call_in_threads(groups: Iterable[Sequence[Callable[[], Item]]], threads: int) -> Iterator[list[Item]]:
    """Calls functions in `threads` threads. Yields what each group of them returns, in order.

    While the results of a group are awaited, the threads have the calls of those after it, and no more than that. One
    thread is that of the caller.
    """
    if threads == 1:
        yield from ([call() for call in group] for group in groups)
        return
    executor, waiting, calls = ThreadPoolExecutor(threads, "load"), deque[list[Future[Item]]](), 0
    try:
        for group in groups:
            waiting.append([executor.submit(call) for call in group])
            calls += len(group)
            if calls - len(waiting[0]) >= threads:
                calls -= len(waiting[0])
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _load_on_ray(loader: PixelLoader, order: BatchOrder, batch_size: int, options: LoadingOptions) -> Iterator[Arrays]:
    block_bytes = min(MAX_BLOCK_ROWS * loader.row_bytes, MAX_BLOCK_BYTES)
    return ray_data.stream_tasks(
        functools.partial(_load_task, loader, order),
        len(order),
        ray_data.TaskPool(options.tasks, options.task_cpus),
        batch_size=batch_size,
        block_bytes=max(block_bytes, batch_size * loader.row_bytes),
        prefetch=options.prefetch,
    )


def prefetch_items(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """Yields `items`, which a thread computes `depth` ahead (decoding releases Python's global lock)."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=fill, daemon=True, name="stream").start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()

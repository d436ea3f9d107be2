"""Store -> batches, in the order of a plan, read, decoded and augmented by Ray Data (or in this process).

Ray Data's rows are tasks: row k of the dataset is the k-th window of the plan, the map function emits this rank's part of its batches, one
after the other, and `preserve_order` keeps them so. One execution covers the whole training: nothing restarts at the end of an epoch.
Every rank builds its own execution, over its own part: `streaming_split` would neither keep the batches the same for 1 and 2 workers, nor
give every image once.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
from PIL import Image

from firstlight.pipeline.data import images
from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment import random_numbers
from firstlight.pipeline.data.augment.targets import Targets
from firstlight.pipeline.data.plan import Batches
from firstlight.pipeline.data.store import Store

Arrays = dict[str, np.ndarray]  # id (B,), label (B,), views (B, V, S, S, 3) uint8, and what `Targets` adds
Encoded = dict[int, tuple[bytes, int]]  # image and label by id
Rows = tuple[np.ndarray, np.ndarray]  # (B,) ids, (B,) passes
MAX_BLOCKS = 10_000  # blocks that Ray Data plans up front; more tasks than that share them
OPEN = 2**20  # pixels of decoded images that wait for what is drawn for them at once
ROWS_PER_BLOCK, BYTES_PER_BLOCK = 1024, 16_000_000  # the block is what travels: large ones delay the first batch


class Pixels(Protocol):
    """Ids -> arrays, in a decoding task or in this process."""

    @property
    def store(self) -> Store: ...

    @property
    def row_bytes(self) -> int:
        """Pixels of one image in a batch."""
        ...

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: Encoded) -> Arrays:
        """(B,) ids, the pass that each is in (0 is the first), and their encoded images and labels -> a batch."""
        ...


@dataclass(frozen=True)
class Loader:
    """Ids -> pixels. Everything that decides a pixel is in here."""

    store: Store
    ops: tuple[tuple[dict[str, Any], ...], ...]  # the augmentation of each view
    size: int  # pixels
    seed: int
    max_pixels: int
    targets: Targets | None = None  # what is learned from besides labels, of the first view

    @property
    def row_bytes(self) -> int:
        return len(self.ops) * self.size**2 * 3

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: Encoded) -> Arrays:
        views = np.empty((len(ids), len(self.ops), self.size, self.size, 3), np.uint8)
        known: list[Arrays] = []
        for start, opened in self._opened(ids, encoded):
            rows = slice(start, start + len(opened))
            sizes = np.array([image.size for image in opened])
            for view in range(len(self.ops)):
                drawn = self.draw(ids[rows], passes[rows], view, sizes)
                for row, pixels in enumerate(augment.apply_each(opened, drawn, self.size), start):
                    views[row, view] = pixels
                if view == 0 and self.targets is not None:
                    known.append(self.targets.of(self.store.annotated(ids[rows]), drawn, self.size))
        more = {name: np.concatenate([part[name] for part in known]) for name in known[0]} if known else {}
        return {**_arrays(ids, encoded, views), **more}

    def draw(self, ids: np.ndarray, passes: np.ndarray, view: int, sizes: np.ndarray) -> list[augment.Drawn]:
        """What the ops of a view do to each image; `sizes`: (B, 2) widths and heights."""
        return augment.draw(self.ops[view], random_numbers.keys(self.seed, passes, ids, view), sizes, self.size)

    def _opened(self, ids: np.ndarray, encoded: Encoded) -> Iterator[tuple[int, list[Image.Image]]]:
        """All images, some at a time, so that large ones do not fill the memory; and the row of the first of them."""
        opened: list[Image.Image] = []
        pixels = start = 0
        for row, image_id in enumerate(ids.tolist()):
            opened.append(images.open_rgb(encoded[image_id][0], self.max_pixels))
            pixels += opened[-1].width * opened[-1].height
            if pixels >= OPEN or row == len(ids) - 1:
                yield start, opened
                opened, pixels, start = [], 0, row + 1

    def read(self, ids: np.ndarray) -> Encoded:
        return read(self.store, ids)

    def once(self, ids: np.ndarray) -> Arrays:
        """The batch of some ids, outside of any plan, read and decoded here; as in the first pass."""
        return self.load(ids, np.zeros_like(ids), self.read(ids))


@dataclass(frozen=True)
class Decoder:
    """Ids -> the images as they are stored, all of one size; the views of a batch are (B, 1, height, width, 3)."""

    store: Store
    width: int
    height: int
    max_pixels: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.height * 3

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: Encoded) -> Arrays:
        views = np.empty((len(ids), 1, self.height, self.width, 3), np.uint8)
        for row, image_id in enumerate(ids.tolist()):
            views[row, 0] = images.decode(encoded[image_id][0], self.max_pixels)
        return _arrays(ids, encoded, views)


def _arrays(ids: np.ndarray, encoded: Encoded, views: np.ndarray) -> Arrays:
    return {"id": ids, "label": np.array([encoded[i][1] for i in ids.tolist()], np.int64), "views": views}


def read(store: Store, ids: np.ndarray) -> Encoded:
    """Encoded images and labels by id; each row group is read once."""
    distinct = np.unique(ids)
    data, labels = store.read(distinct)
    return {i: (d, label) for i, d, label in zip(distinct.tolist(), data, labels.tolist(), strict=True)}


class Order(Protocol):
    """What one rank reads: tasks, each a list of batches of ids that are read together."""

    def __len__(self) -> int: ...

    def task(self, index: int) -> list[Rows]:
        """The ids of each of this rank's batches, and the pass that each image is in."""
        ...


@dataclass(frozen=True)
class TrainOrder:
    """A rank's part of the steps `start`..`stop` (counted over all epochs) of a plan."""

    plan: Batches
    rank: int
    world: int
    start: int
    stop: int

    @property
    def _tasks_per_epoch(self) -> int:
        return -(-self.plan.steps // self.plan.steps_per_task)

    @property
    def _first(self) -> int:
        epoch, step = divmod(self.start, self.plan.steps)
        return epoch * self._tasks_per_epoch + step // self.plan.steps_per_task

    def __len__(self) -> int:
        if self.start >= self.stop:
            return 0
        epoch, step = divmod(self.stop - 1, self.plan.steps)
        return epoch * self._tasks_per_epoch + step // self.plan.steps_per_task + 1 - self._first

    def task(self, index: int) -> list[Rows]:
        epoch, place = divmod(self._first + index, self._tasks_per_epoch)
        base = epoch * self.plan.steps
        first = place * self.plan.steps_per_task
        steps = range(first, min(first + self.plan.steps_per_task, self.plan.steps))
        return [self.plan.slice(epoch, s, self.rank, self.world) for s in steps if self.start <= base + s < self.stop]


@dataclass(frozen=True)
class EvalOrder:
    """A rank's part of `ids`, in their order, without augmentation's randomness mattering: rank r has the r-th of `world` equal parts."""

    ids: np.ndarray
    batch_size: int
    rank: int
    world: int
    batches_per_task: int = 4

    @property
    def part(self) -> np.ndarray:
        return np.array_split(self.ids, self.world)[self.rank]

    def __len__(self) -> int:
        return -(-len(self.part) // (self.batch_size * self.batches_per_task))

    def task(self, index: int) -> list[Rows]:
        rows = self.part[index * self.batch_size * self.batches_per_task :][: self.batch_size * self.batches_per_task]
        parts = [rows[k : k + self.batch_size] for k in range(0, len(rows), self.batch_size)]
        return [(part, np.zeros(len(part), np.int64)) for part in parts]


@dataclass(frozen=True)
class Options:
    """`conf`'s stream section, and whether Ray is there."""

    on_ray: bool
    prefetch: int
    tasks: int
    task_cpus: float
    resident: np.ndarray | None = field(
        default=None, compare=False
    )  # sorted ids that trainings hold decoded; None: they stream
    on_device: bool = False  # what trainings stream is augmented on their device


def batches(loader: Pixels, order: Order, batch_size: int, options: Options) -> Iterator[Arrays]:
    """The batches of one rank, in order; all have `batch_size` rows but the last of an `EvalOrder`.

    Raises:
        RuntimeError: rows arrived that the plan does not have in this place (a defect, never a user's mistake).
    """
    if len(order) == 0:
        return
    rows = (
        _on_ray(loader, order, batch_size, options)
        if options.on_ray
        else prefetched(_in_process(loader, order), options.prefetch)
    )
    expected = (ids for k in range(len(order)) for ids, _ in order.task(k))
    for ids, batch in zip_longest(expected, rows):
        if ids is None or batch is None or not np.array_equal(ids, batch["id"]):
            planned, got = (
                None if x is None else x[:4].tolist() for x in (ids, None if batch is None else batch["id"])
            )
            raise RuntimeError(f"the stream is out of order: planned were the ids {planned}..., there came {got}...")
        yield batch


def _task(loader: Pixels, order: Order, index: int) -> Iterator[Arrays]:
    rows = order.task(index)
    encoded = read(loader.store, np.concatenate([ids for ids, _ in rows]))
    for ids, passes in rows:
        yield loader.load(ids, passes, encoded)


def _in_process(loader: Pixels, order: Order) -> Iterator[Arrays]:
    for index in range(len(order)):
        yield from _task(loader, order, index)


class _Breathe:
    """Ray Data's scheduling loop, a thread of the training worker, does not sleep while decoded blocks wait to be consumed: it took a third of
    a core from the training. Ten milliseconds of sleep a turn leave it a hundred turns a second."""

    def before_execution_starts(self, executor: Any) -> None:
        return

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(0.01)

    def after_execution_succeeds(self, executor: Any) -> None:
        return

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        return


def numbered_rows(count: int) -> Any:
    """A dataset of the rows {id: 0}, {id: 1}, ..., in as many blocks. They lie there: those of `ray.data.range` are written by tasks of their
    own, one for every decoding task, each of which waits for a whole CPU."""
    import ray.data

    return ray.data.from_items([{"id": k} for k in range(count)], override_num_blocks=min(count, MAX_BLOCKS))


def _on_ray(loader: Pixels, order: Order, batch_size: int, options: Options) -> Iterator[Arrays]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = max(
        min(ROWS_PER_BLOCK * loader.row_bytes, BYTES_PER_BLOCK), batch_size * loader.row_bytes
    )
    context.custom_execution_callback_classes = [_Breathe]  # type: ignore[list-item]

    def load(rows: Arrays) -> Iterator[Arrays]:
        for index in rows["id"].tolist():
            yield from _task(loader, order, index)

    # Ray's default repeats a crashing task for ever. Of Ray 2.60's map functions only this one takes `max_retries` without a warning.
    dataset = numbered_rows(len(order)).map_batches_internal(
        load,
        batch_size=None,
        num_cpus=options.task_cpus,
        compute=ray.data.TaskPoolStrategy(size=min(options.tasks, len(order))),
        max_retries=2,
    )
    for batch in dataset.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=options.prefetch):
        yield dict(batch)


def prefetched(items: Iterable[Arrays], depth: int) -> Iterator[Arrays]:
    """`items`, computed `depth` ahead by a thread (decoding releases the interpreter's lock)."""
    box: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                box.put(item, timeout=0.1)
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
            item, error = box.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()

"""An estimate of the memory that a recipe needs on this machine, which is checked before Ray Train starts.

Ray does not count the heap of its tasks. Without the check, the system would kill a process minutes into a run.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import RAY_TASKS, USUAL_STORE_MB, StreamOptions
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS
from firstlight.pipeline.data.manifest import MAX_GROUP_BYTES
from firstlight.pipeline.data.row_groups import IMAGE_CACHE_BYTES
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import MAX_BLOCK_BYTES, MAX_BLOCK_ROWS
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.train.held import budget
from firstlight.tasks.nn.encoders import Encoder

# Memory that a process shares with no other, measured (docs/performance.md).
# Ray itself: its servers, and the actors of Ray Train and Ray Data.
RAY_BYTES = 1_300_000_000
# A training worker that has imported torch, and loaded the compiled augmentations.
WORKER_BYTES = 705_000_000
# A decoding task that has imported pyarrow and Pillow, and loaded the compiled augmentations.
TASK_BYTES = 195_000_000
# Blocks in the object store for each decoding task: two that wait in its stream (Ray Data's default), and the one that
# it writes.
BLOCKS_PER_TASK = 3
# The share of the free memory that decoding tasks take where the machine chooses their number.
TASKS_SHARE = 0.5
CGROUP_FOLDER = Path("/sys/fs/cgroup")
# Ray's object store is there.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


@dataclass(frozen=True)
class StreamMemory:
    """The bytes of one stream of a worker: those of a block, and those of a batch that is made from blocks."""

    block: int
    batch: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes over all workers.

    The network, its optimiser and its activations are not included, because they are not known before.
    """

    # Decoded images that are on their way through the object store.
    in_flight: int
    # The limit of the object store, `scale.object_store_mb`.
    object_store: int
    # Decoding tasks: their processes, the encoded images of a window, the largest image decoded, a block being built.
    tasks: int
    # Training workers: their processes, and two batches as float.
    workers: int
    # Images that are kept decoded; 0 if they are kept on GPUs.
    held: int
    # The state that the method keeps for every image.
    tables: int
    # Ray itself.
    ray: int

    @property
    def total(self) -> int:
        return self.object_store + self.tasks + self.workers + self.held + self.tables + self.ray

    def bytes_by_key(self) -> dict[str, int]:
        """Returns parts of `total` by the key of the recipe that lowers them."""
        return {
            "stream.tasks": self.tasks,
            "scale.workers": self.workers,
            "stream.resident_mb": self.held,
            "scale.object_store_mb": self.object_store,
        }

    def __str__(self) -> str:
        return (
            f"object store {_format_megabytes(self.object_store)} "
            f"(decoded images on their way {_format_megabytes(self.in_flight)}), "
            f"decoding tasks {_format_megabytes(self.tasks)}, training workers {_format_megabytes(self.workers)}, "
            f"held images {_format_megabytes(self.held)}, tables {_format_megabytes(self.tables)}, "
            f"Ray {_format_megabytes(self.ray)}"
        )


def check_memory(recipe: Recipe, store: Store, images: int) -> MemoryEstimate:
    """Estimates the memory of a recipe with `images` in the training split, and compares it with that of this machine.

    On a cluster nothing is compared, because the machines are not known. Returns the estimate.

    Raises:
        UserError: names the key to lower, the bytes that are needed and those that are free.
    """
    needed = estimate_memory(recipe, store, images)
    if recipe.scale.max_workers and recipe.scale.address == "local":
        compare_memory(recipe, needed, free_memory())
    return needed


def estimate_memory(recipe: Recipe, store: Store, images: int) -> MemoryEstimate:
    """Returns the estimate for a recipe, a store, and a training split of `images` images."""
    workers, stream, tasks = recipe.scale.max_workers, recipe.stream, recipe.stream.count_tasks(on_ray=True)
    traffic = list(_list_streams(recipe))
    block = max((t.block for t in traffic), default=0)
    task = TASK_BYTES + _encoded_bytes(recipe, store) + 2 * _largest_image_bytes(store) + 4 * block
    here = _held_image_bytes(recipe, store, images)
    return MemoryEstimate(
        in_flight=workers * max((_bytes_in_flight(t, stream, tasks) for t in traffic), default=0),
        object_store=recipe.scale.object_store_bytes,
        tasks=workers * tasks * task,
        workers=workers * (WORKER_BYTES + 2 * 4 * max((t.batch for t in traffic), default=0)),
        held=workers * here,
        tables=images * _table_row_bytes(recipe, len(store.classes)),
        ray=RAY_BYTES,
    )


def compare_memory(recipe: Recipe, needed: MemoryEstimate, free: int) -> None:
    """Compares an estimate with the object store of the recipe and with `free` bytes of memory.

    Raises:
        UserError: as `check_memory`.
    """
    stream, tasks = recipe.stream, recipe.stream.count_tasks(on_ray=True)
    if needed.in_flight > needed.object_store:
        need = -(-needed.in_flight // 2**20)
        raise UserError(
            f"scale.object_store_mb: {recipe.scale.object_store_bytes // 2**20} is less than the {need:,} MB that "
            f"decoded images on their way to {recipe.scale.max_workers} workers take; valid: at least {need}, or a "
            f"smaller stream.prefetch ({stream.prefetch}), stream.tasks ({tasks}) or batch_size"
        )
    if needed.total > free:
        values = {
            "stream.tasks": tasks,
            "scale.workers": recipe.scale.max_workers,
            "stream.resident_mb": stream.resident_mb,
            "scale.object_store_mb": recipe.scale.object_store_bytes // 2**20,
        }
        first, *others = sorted(needed.bytes_by_key(), key=lambda key: -needed.bytes_by_key()[key])
        raise UserError(
            f"{first}: {values[first]} is not valid: of {_format_megabytes(free)} of memory that are free, "
            f"{_format_megabytes(needed.total)} would be needed: {needed}; "
            f"valid: less, or less of {', '.join(f'{key} ({values[key]})' for key in others)}"
        )


def free_memory() -> int:
    """Returns the bytes that new processes can have on this machine or in this container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP_FOLDER / "memory.max").read_text().strip()
        used = dict(line.split() for line in (CGROUP_FOLDER / "memory.stat").read_text().splitlines())
        return min(free, int(limit) - int(used["anon"])) if limit != "max" else free
    # This is no container, or one without these files.
    except (OSError, ValueError, KeyError):
        return free


def _list_streams(recipe: Recipe) -> Iterator[StreamMemory]:
    """Yields the streams of all stages, for trainings and for scoring."""
    workers, pixels = max(recipe.scale.max_workers, 1), recipe.dataset.pixels or RGB_PIXELS
    for stage in recipe.stages.values():
        for images, sizes in stage_kind(stage).streamed_batches(stage, recipe.dataset, workers):
            yield _measure_stream(images, sum(size**2 for size in sizes) * pixels.pixel_bytes)


def _measure_stream(rows: int, row_bytes: int) -> StreamMemory:
    return StreamMemory(max(min(MAX_BLOCK_ROWS * row_bytes, MAX_BLOCK_BYTES), rows * row_bytes), rows * row_bytes)


def _bytes_in_flight(traffic: StreamMemory, stream: StreamOptions, tasks: int) -> int:
    """Returns the least bytes of one worker. Ray Data runs further ahead if it can, up to half of the object store."""
    return (BLOCKS_PER_TASK * tasks + 1) * traffic.block + stream.prefetch * traffic.batch


def choose_tasks(recipe: Recipe, most: int) -> int:
    """Returns the number of decoding tasks of each worker, at most `most`, that this machine has memory for, and room
    in its shared memory for Ray's object store: RAY_TASKS at least.

    The images are not known yet: a task may hold as much of them as its cache and a window allow.
    """
    traffic, workers = list(_list_streams(recipe)), max(recipe.scale.max_workers, 1)
    block = max((t.block for t in traffic), default=0)
    task = TASK_BYTES + 2 * IMAGE_CACHE_BYTES + MAX_GROUP_BYTES + (4 + BLOCKS_PER_TASK) * block
    fit = int(free_memory() * TASKS_SHARE) // (task * workers)
    if recipe.scale.max_workers and SHARED_MEMORY.exists():
        room = shutil.disk_usage(SHARED_MEMORY).free // workers
        fit = min(fit, *(_count_store_tasks(t, recipe.stream, room) for t in traffic))
    return max(min(most, fit), RAY_TASKS)


def _count_store_tasks(traffic: StreamMemory, stream: StreamOptions, room: int) -> int:
    """Returns the number of tasks for which `_bytes_in_flight` is at most `room`."""
    return (room - stream.prefetch * traffic.batch - traffic.block) // max(BLOCKS_PER_TASK * traffic.block, 1)


def choose_object_store(recipe: Recipe, tasks: int) -> int:
    """Returns the size of Ray's object store in MB for this number of decoding tasks of each worker."""
    needed = max((_bytes_in_flight(t, recipe.stream, tasks) for t in _list_streams(recipe)), default=0)
    return max(-(-needed * recipe.scale.max_workers // 2**20), USUAL_STORE_MB)


def _encoded_bytes(recipe: Recipe, store: Store) -> int:
    """Returns the encoded bytes of a decoding task: its window, its cached row groups, and the one that it reads."""
    total = sum(shard.bytes for shard in store.shards)
    an_image = max(total // sum(shard.count for shard in store.shards), 1)
    return min(total, IMAGE_CACHE_BYTES + min(recipe.stream.window * an_image, IMAGE_CACHE_BYTES) + MAX_GROUP_BYTES)


def _held_image_bytes(recipe: Recipe, store: Store, images: int) -> int:
    """Returns the bytes of the decoded images, and of the views outside of trainings, that a worker holds in memory."""
    most, most_views = budget.divide_held_bytes(recipe.stream, store, images)
    is_held = budget.should_cache(recipe.stream, store, images)
    held = budget.estimate_held_bytes(store, images) or 0
    views = sum(store.splits.values()) * recipe.dataset.image_size**2 * store.pixels.pixel_bytes
    # Images of one size are held on the device, and streamed if they do not fit there.
    is_elsewhere = store.common_size is not None and (not is_held or bool(recipe.scale.worker_gpus))
    return (0 if is_elsewhere else min(held, most)) + min(views, most_views)


def _largest_image_bytes(store: Store) -> int:
    """Returns the bytes of an image with the largest width and height of the store, decoded."""
    width, height = (store.images.get(side, (0, 0))[1] for side in ("width", "height"))
    return int(width * height * store.pixels.pixel_bytes)


def _table_row_bytes(recipe: Recipe, classes: int) -> int:
    """Returns the bytes that a method keeps for an image, the maximum over all stages."""

    def build_encoder() -> Encoder:
        return Encoder(recipe.network_spec, recipe.dataset.image_size)

    stages = recipe.stages.values()
    return int(max(stage_kind(stage).table_bytes(stage, build_encoder, classes) for stage in stages))


def _format_megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"

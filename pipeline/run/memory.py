"""What a recipe will hold in this machine's memory, estimated from the recipe and the store's manifest, and checked before Ray Train starts.

Ray does not count what a task holds on its heap: too much of it ends in a process that the system kills, minutes into a run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.manifest import MAX_GROUP_BYTES
from firstlight.pipeline.data.row_groups import IMAGE_CACHE_BYTES
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import MAX_BLOCK_BYTES, MAX_BLOCK_ROWS
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.train import device_cache
from firstlight.tasks.nn.encoders import Encoder

# Memory of processes that no other process shares, measured (docs/performance.md)
RAY_BYTES = 1_300_000_000  # Ray's own: its servers, and the actors of Ray Train and Ray Data
WORKER_BYTES = 650_000_000  # a training worker that has imported torch
TASK_BYTES = 140_000_000  # a decoding task that has imported pyarrow and Pillow
# Blocks in the object store for each decoding task: two that wait in its stream (Ray Data's default), and the one that it writes
BLOCKS_PER_TASK = 3
CGROUP_FOLDER = Path("/sys/fs/cgroup")
ROWS = 1024  # of the tables that are built to be measured


@dataclass(frozen=True)
class StreamMemory:
    """One stream of a worker, in bytes: the blocks that travel, and a batch, as it is read from them."""

    block: int
    batch: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, of all workers together. Not in it, as nothing tells before: what a network, its optimiser and its activations take."""

    in_flight: int  # decoded images in the object store, on their way
    object_store: int  # what the object store may take: `scale.object_store_mb`
    tasks: int  # decoding tasks: their processes, the encoded images of a window, the largest image decoded, a block being built
    workers: int  # training workers: their processes, and two batches as float
    held: int  # images that are held decoded; 0 where that is on GPUs
    tables: int  # the state that the method keeps for every image
    ray: int  # Ray itself

    @property
    def total(self) -> int:
        return self.object_store + self.tasks + self.workers + self.held + self.tables + self.ray

    def bytes_by_key(self) -> dict[str, int]:
        """The parts of `total`, by the key that lowers each."""
        return {
            "stream.tasks": self.tasks,
            "scale.workers": self.workers,
            "stream.resident_mb": self.held,
            "scale.object_store_mb": self.object_store,
        }

    def __str__(self) -> str:
        return (
            f"object store {_format_megabytes(self.object_store)} (decoded images on their way {_format_megabytes(self.in_flight)}), decoding tasks {_format_megabytes(self.tasks)}, "
            f"training workers {_format_megabytes(self.workers)}, held images {_format_megabytes(self.held)}, tables {_format_megabytes(self.tables)}, Ray {_format_megabytes(self.ray)}"
        )


def check_memory(recipe: Recipe, store: Store, images: int) -> MemoryEstimate:
    """The estimate, with `images` in the training split, against what this machine has free. On a cluster nothing is known of the machines.

    Raises:
        UserError: names the key to lower, what is needed and what there is.
    """
    needed = estimate_memory(recipe, store, images)
    if recipe.scale.max_workers and recipe.scale.address == "local":
        compare_memory(recipe, needed, free_memory())
    return needed


def estimate_memory(recipe: Recipe, store: Store, images: int) -> MemoryEstimate:
    """A function of its arguments alone."""
    workers, stream = recipe.scale.max_workers, recipe.stream
    traffic = list(_list_streams(recipe))
    task = (
        TASK_BYTES + _encoded_bytes(recipe, store) + 2 * _largest_image_bytes(store) + 4 * max(t.block for t in traffic)
    )
    held = device_cache.should_cache(stream, store, images) and not recipe.scale.gpus_per_worker
    return MemoryEstimate(
        in_flight=workers * max(_bytes_in_flight(t, recipe) for t in traffic),
        object_store=recipe.scale.object_store_mb * 2**20,
        tasks=workers * stream.tasks * task,
        workers=workers * (WORKER_BYTES + 2 * 4 * max(t.batch for t in traffic)),
        held=workers * images * _largest_image_bytes(store) if held else 0,
        tables=images * _table_row_bytes(recipe, len(store.classes)),
        ray=RAY_BYTES,
    )


def compare_memory(recipe: Recipe, needed: MemoryEstimate, free: int) -> None:
    """`needed` against the object store of the recipe, and against `free` bytes of memory.

    Raises:
        UserError: as `check`.
    """
    stream = recipe.stream
    if needed.in_flight > needed.object_store:
        need = -(-needed.in_flight // 2**20)
        raise UserError(
            f"scale.object_store_mb: {recipe.scale.object_store_mb} is less than the {need:,} MB that decoded images on their way to "
            f"{recipe.scale.max_workers} workers take; valid: at least {need}, or a smaller stream.prefetch ({stream.prefetch}), "
            f"stream.tasks ({stream.tasks}) or batch_size"
        )
    if needed.total > free:
        values = {
            "stream.tasks": stream.tasks,
            "scale.workers": recipe.scale.max_workers,
            "stream.resident_mb": stream.resident_mb,
            "scale.object_store_mb": recipe.scale.object_store_mb,
        }
        first, *others = sorted(needed.bytes_by_key(), key=lambda key: -needed.bytes_by_key()[key])
        raise UserError(
            f"{first}: {values[first]} is not valid: of {_format_megabytes(free)} of memory that are free, {_format_megabytes(needed.total)} would be needed: {needed}; "
            f"valid: less, or less of {', '.join(f'{key} ({values[key]})' for key in others)}"
        )


def free_memory() -> int:
    """Bytes that new processes can have on this machine, or in this container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP_FOLDER / "memory.max").read_text().strip()
        used = dict(line.split() for line in (CGROUP_FOLDER / "memory.stat").read_text().splitlines())
        return min(free, int(limit) - int(used["anon"])) if limit != "max" else free
    except (OSError, ValueError, KeyError):  # not in a container, or in one that does not tell
        return free


def _list_streams(recipe: Recipe) -> Iterator[StreamMemory]:
    """The streams of all stages: of trainings, and of passes over images that are scored."""
    workers, image = max(recipe.scale.max_workers, 1), recipe.dataset.image_size**2 * 3
    for stage in recipe.stages.values():
        for images, views in stage_kind(stage).streamed_batches(stage, workers):
            yield _measure_stream(images, views * image)


def _measure_stream(rows: int, row_bytes: int) -> StreamMemory:
    return StreamMemory(max(min(MAX_BLOCK_ROWS * row_bytes, MAX_BLOCK_BYTES), rows * row_bytes), rows * row_bytes)


def _bytes_in_flight(traffic: StreamMemory, recipe: Recipe) -> int:
    """Of one worker, at the least: with more room Ray Data runs further ahead, up to half of the object store."""
    return (BLOCKS_PER_TASK * recipe.stream.tasks + 1) * traffic.block + recipe.stream.prefetch * traffic.batch


def _encoded_bytes(recipe: Recipe, store: Store) -> int:
    """What a decoding task has read: its window, beside the row groups that it keeps, and the one that is being read."""
    total = sum(shard.bytes for shard in store.shards)
    an_image = max(total // sum(shard.count for shard in store.shards), 1)
    return min(total, IMAGE_CACHE_BYTES + min(recipe.stream.window * an_image, IMAGE_CACHE_BYTES) + MAX_GROUP_BYTES)


def _largest_image_bytes(store: Store) -> int:
    """Bytes of the largest image, decoded: of all images, where they are of one size."""
    width, height = (store.images.get(side, (0, 0))[1] for side in ("width", "height"))
    return int(width * height * 3)


def _table_row_bytes(recipe: Recipe, classes: int) -> int:
    """Bytes that a method keeps for an image, the most of all stages."""

    def build_encoder() -> Encoder:
        return Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size)

    stages = recipe.stages.values()
    return int(max(stage_kind(stage).table_bytes(stage, build_encoder, classes) for stage in stages))


def _format_megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"

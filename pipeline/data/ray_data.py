"""The adapter to Ray Data: the only module that imports `ray.data`.

Its functions import Ray when they are called, so that runs and tests without Ray do not load it.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from firstlight.pipeline.data.loader import Arrays

# Pixels (B, S, S, C) uint8 or uint16 -> (B, ...) answers.
NetworkFunction = Callable[[np.ndarray], np.ndarray]
# Number of blocks that Ray Data plans in advance; if there are more tasks, several share a block.
MAX_PLANNED_BLOCKS = 10_000
MAX_TASK_RETRIES = 2
SCHEDULER_PAUSE_S = 0.01
JOB_CPUS = 0.5


@dataclass(frozen=True)
class TaskPool:
    """Decoding tasks: how many run at a time, and the CPUs of each."""

    count: int
    cpus: float


@dataclass(frozen=True)
class ActorPool:
    """Actors that hold a network, and the tasks that decode for all of them."""

    count: int
    cpus: float
    gpus: float
    decoding: TaskPool


class _ThrottleScheduler:
    """Callback that lets Ray Data's scheduling loop sleep.

    The loop is a thread of the training worker and does not sleep while decoded blocks wait to be consumed: it took a
    third of a core from the training. A sleep of 10 ms per iteration leaves it up to a hundred iterations a second.
    """

    def before_execution_starts(self, executor: Any) -> None:
        return

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(SCHEDULER_PAUSE_S)

    def after_execution_succeeds(self, executor: Any) -> None:
        return

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        return


def stream_tasks(
    load: Callable[[int], Iterator[Arrays]],
    num_tasks: int,
    pool: TaskPool,
    *,
    batch_size: int,
    block_bytes: int,
    prefetch: int,
) -> Iterator[Arrays]:
    """Yields the rows that `load` gives for the tasks 0, 1, ..., in this order, in batches of `batch_size` rows.

    One execution covers all tasks, so that nothing restarts at the end of an epoch. `prefetch` batches are fetched
    ahead of the consumer.
    """
    context = _configure_ordered_execution(block_bytes)
    context.custom_execution_callback_classes = [_ThrottleScheduler]
    rows = _map_task_numbers(load, num_tasks, pool)
    for batch in rows.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=prefetch):
        yield dict(batch)


def predict_on_actors(
    load: Callable[[int], np.ndarray],
    num_batches: int,
    build_network: Callable[[], NetworkFunction],
    pool: ActorPool,
    *,
    batch_bytes: int,
    prefetch: int,
) -> Iterator[np.ndarray]:
    """Yields the answers of the network for the pixels `load(0)`, `load(1)`, ..., (B, ...) each, in this order.

    A row of the dataset is a whole batch: neither the blocks nor the number of actors decide what is in a batch, and
    so they do not change a bit of the answers. `prefetch` batches wait at each actor while it computes another one.

    Raises:
        RuntimeError: an answer came out of order (a defect, never a user's mistake).
    """
    _configure_ordered_execution(max(batch_bytes, 1))

    def load_batch(index: int) -> Iterator[dict[str, Any]]:
        pixels = load(index)
        facts = {"shape": [list(pixels.shape)], "type": [pixels.dtype.str]}
        yield {"batch": [index], "pixels": [pixels.tobytes()], **facts}

    answered = _map_batches(
        _map_task_numbers(load_batch, num_batches, pool.decoding),
        _NetworkActor,
        fn_constructor_args=(build_network,),
        batch_size=1,
        compute=actor_strategy(pool.count, prefetch),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        # Ray's default restarts an actor that dies for ever. The caller resumes after the batches that are done.
        max_restarts=0,
    )
    for index, row in enumerate(answered.iter_rows()):
        if row["batch"] != index:
            raise RuntimeError(f"the answers are out of order: batch {row['batch']} came at position {index}")
        yield np.frombuffer(row["answer"], row["type"]).reshape(row["shape"])


class _NetworkActor:
    """Holds the network. Pixels and answers travel as bytes, because batches differ in length."""

    def __init__(self, build_network: Callable[[], NetworkFunction]) -> None:
        self.network = build_network()

    def __call__(self, rows: Arrays) -> dict[str, Any]:
        answers = [
            self.network(np.frombuffer(pixels, dtype).reshape(shape))
            for pixels, shape, dtype in zip(rows["pixels"], rows["shape"], rows["type"], strict=True)
        ]
        return {
            "batch": rows["batch"],
            "shape": [list(answer.shape) for answer in answers],
            "answer": [answer.tobytes() for answer in answers],
            "type": [answer.dtype.str for answer in answers],
        }


def actor_strategy(num_actors: int, prefetch: int) -> Any:
    """Returns a pool of `num_actors` actors; `prefetch` batches are sent to an actor ahead of the one it computes."""
    import ray.data

    return ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=prefetch + 1)


def run_jobs(work: Callable[[Any], Any], jobs: list[Any]) -> Generator[Any, None, None]:
    """Yields the results of `work` for each of `jobs`, in the order in which they finish; one task per job.

    Jobs and results are plain JSON values. The settings of Ray Data in this process are restored afterwards.

    Raises:
        ray.exceptions.RayError: a task crashed more often than `MAX_TASK_RETRIES`, or raised.
    """
    import ray.data

    if not jobs:
        return
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars, context.print_on_execution_start = False, False
    try:
        rows = ray.data.from_items([{"job": json.dumps(job)} for job in jobs], override_num_blocks=len(jobs))
        done = _map_batches(rows, _JobTask(work), batch_size=1, num_cpus=JOB_CPUS, max_retries=MAX_TASK_RETRIES)
        for row in done.iter_rows():
            yield json.loads(row["result"])
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before


@dataclass(frozen=True)
class _JobTask:
    """`work` as a map function of Ray Data."""

    work: Callable[[Any], Any]

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self.work(json.loads(job))) for job in rows["job"]]}


def _configure_ordered_execution(block_bytes: int) -> Any:
    """Makes Ray Data keep the order of rows and be silent, with blocks of about `block_bytes`. Returns its context."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = block_bytes
    return context


def _map_task_numbers(load: Callable[[int], Iterator[Any]], count: int, pool: TaskPool) -> Any:
    """Returns the dataset of the rows that `load` yields for the numbers 0 .. `count` - 1."""
    import ray.data

    def load_rows(rows: Arrays) -> Iterator[Any]:
        for number in rows["number"].tolist():
            yield from load(number)

    # The blocks of `from_items` exist at once. The tasks of `ray.data.range` write blocks of their own, one task for
    # every decoding task, each of which waits for a whole CPU.
    num_blocks = min(count, MAX_PLANNED_BLOCKS)
    numbers = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=num_blocks)
    return _map_batches(
        numbers,
        load_rows,
        batch_size=None,
        num_cpus=pool.cpus,
        compute=ray.data.TaskPoolStrategy(size=min(pool.count, count)),
        max_retries=MAX_TASK_RETRIES,
    )


def _map_batches(dataset: Any, function: Any, **options: Any) -> Any:
    """Calls `Dataset.map_batches` by the internal method of Ray Data.

    Ray's default repeats a crashing task for ever. Only the internal one of the map methods of Ray 2.60 takes
    `max_retries` and `max_restarts` without a deprecation warning.
    """
    return dataset.map_batches_internal(function, **options)

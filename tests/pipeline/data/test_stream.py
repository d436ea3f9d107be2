"""The order of batches and every pixel are functions of the plan, not of the worker, a restart or Ray."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.loader import Arrays, Loader
from firstlight.pipeline.data.plan import BatchPlan, SemiSupervisedPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import EvalOrder, LoadingOptions, TrainOrder, stream_batches
from tests.support.digit_batches import DIGIT_BATCH as BATCH
from tests.support.digit_batches import DIGIT_OPS as OPS
from tests.support.digit_batches import LOCAL_LOADING as OPTIONS
from tests.support.digit_batches import digit_loader as loader
from tests.support.digit_batches import digit_plan as plan


def train(
    store: Store,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    epochs: int = 2,
    options: LoadingOptions = OPTIONS,
    windowed: bool = False,
) -> list[Arrays]:
    its = plan(store, windowed)
    order = TrainOrder(its, rank, world, start, epochs * its.steps)
    return list(stream_batches(loader(store), order, BATCH // world, options))


def assert_same(found: list[Arrays], expected: list[Arrays]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() == {"id", "label", "pass", "views"}
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert np.array_equal(a[key], b[key]), key


@pytest.mark.parametrize("windowed", [False, True])
def test_every_step_has_ids_and_passes_of_the_plan(digits: Store, windowed: bool) -> None:
    its, found = plan(digits, windowed), train(digits, windowed=windowed)
    assert its.steps == 8
    assert its.steps_per_task == 3
    assert len(found) == 16
    for step, batch in enumerate(found):
        assert np.array_equal(batch["id"], its.epoch(step // 8)[step % 8])
        assert batch["pass"].tolist() == [step // 8] * BATCH
        assert np.array_equal(batch["label"], digits.read(batch["id"])[1])
        assert batch["label"].dtype == batch["id"].dtype == np.int64
        assert batch["views"].shape == (BATCH, 2, 8, 8, 3)
        assert batch["views"].dtype == np.uint8


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("windowed", [False, True])
def test_parts_of_ranks_make_the_batches_of_one_rank(digits: Store, world: int, windowed: bool) -> None:
    parts = [train(digits, rank, world, windowed=windowed) for rank in range(world)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, train(digits, windowed=windowed))


def test_stream_started_at_any_step_is_the_rest_of_the_whole(digits: Store) -> None:
    whole = train(digits)
    for start in range(17):
        assert_same(train(digits, start=start), whole[start:])


def test_order_started_and_stopped_anywhere_has_the_planned_ids(digits: Store) -> None:
    its = plan(digits)
    ids = [its.slice(step // 8, step % 8, 1, 2)[0].tolist() for step in range(24)]
    for start in range(25):
        for stop in range(start, 25):
            order = TrainOrder(its, 1, 2, start, stop)
            tasks = [order.list_batches(k) for k in range(len(order))]
            assert all(tasks), "a task without work"
            assert [row.tolist() for rows in tasks for row, _ in rows] == ids[start:stop]
            assert [set(passes.tolist()) for rows in tasks for _, passes in rows] == [
                {step // 8} for step in range(start, stop)
            ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50, 64, 97])
def test_eval_order_has_every_image_once_in_order(digits: Store, world: int, count: int) -> None:
    ids = np.arange(count) * 7 + 2
    seen = []
    for rank in range(world):
        order = EvalOrder(ids, 8, rank, world, batches_per_task=2)
        found = list(stream_batches(loader(digits), order, 8, OPTIONS))
        assert all(len(batch["id"]) == 8 for batch in found[:-1])
        assert all(0 < len(batch["id"]) == len(batch["views"]) for batch in found)
        seen += [i for batch in found for i in batch["id"].tolist()]
    assert seen == ids.tolist()


def test_labelled_images_are_augmented_differently_in_each_pass(digits: Store) -> None:
    starts = digits.list_row_groups("train")[:, 2]
    its = SemiSupervisedPlan(
        BatchPlan(np.arange(4), starts, 2, 0, 36, False), BatchPlan(np.arange(10, 50), starts, 4, 0, 36, False)
    )
    seen: dict[int, list[bytes]] = {}
    for batch in stream_batches(loader(digits), TrainOrder(its, 0, 1, 0, its.steps), 6, OPTIONS):
        for image_id, views in zip(batch["id"].tolist(), batch["views"], strict=True):
            seen.setdefault(image_id, []).append(views.tobytes())
    assert all(len(seen[image_id]) == 5 for image_id in range(4)), "ten steps of two"
    assert all(len(set(copies)) == len(copies) for copies in seen.values())


def streams() -> set[threading.Thread]:
    """Returns the threads of all streams: the one that joins the batches, and those that load parts of them."""
    return {t for t in threading.enumerate() if t.name == "stream" or t.name.startswith("load_")}


def ended(threads: set[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(5)
    return not any(thread.is_alive() for thread in threads)


class Breaks(Loader):
    """Cannot read the last image of the fifth batch."""

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: dict[int, Any]) -> Arrays:
        if plan(self.store).epoch(0)[4][-1] in ids:
            raise OSError("the disk is gone")
        return super().load(ids, passes, encoded)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_loading_error_reaches_the_consumer_at_its_batch(digits: Store, threads: int) -> None:
    its, options = Breaks(digits, (OPS,), 8, 0, 1_000_000), replace(OPTIONS, tasks=threads)
    others, stream = streams(), stream_batches(its, TrainOrder(plan(digits), 0, 1, 0, 8), BATCH, options)
    assert [len(next(stream)["id"]) for _ in range(4)] == [BATCH] * 4
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert ended(streams() - others)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("read", [1, 3, 16])
def test_closed_stream_ends_its_threads(digits: Store, read: int, threads: int) -> None:
    its, others, options = plan(digits), streams(), replace(OPTIONS, tasks=threads)
    stream: Iterator[Arrays] = stream_batches(loader(digits), TrainOrder(its, 0, 1, 0, 16), BATCH, options)
    for _ in range(read):
        next(stream)
    started = streams() - others
    assert len(started) <= (1 if threads == 1 else 1 + threads)
    assert started or read == 16
    stream.close()  # type: ignore[attr-defined]
    assert ended(started)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_any_number_of_threads_gives_the_same_batches(digits: Store, threads: int, windowed: bool) -> None:
    """A batch has twelve images, of which a thread loads six at least."""
    options = replace(OPTIONS, tasks=threads)
    assert_same(train(digits, options=options, windowed=windowed), train(digits, windowed=windowed))
    assert_same(train(digits, 1, 2, 5, options=options), train(digits, 1, 2, 5))
    sweep = EvalOrder(np.arange(2, 91), 40, 0, 1, batches_per_task=1)
    assert_same(
        list(stream_batches(loader(digits), sweep, 40, options)),
        list(stream_batches(loader(digits), sweep, 40, OPTIONS)),
    )


def test_threads_load_parts_of_a_batch_at_a_time(digits: Store) -> None:
    """Each waits until another one loads the other half."""
    meeting = threading.Barrier(2, timeout=60)

    class Meets(Loader):
        def load(self, ids: np.ndarray, passes: np.ndarray, encoded: dict[int, Any]) -> Arrays:
            meeting.wait()
            return super().load(ids, passes, encoded)

    order, options = TrainOrder(plan(digits), 0, 1, 0, 8), replace(OPTIONS, tasks=2)
    assert len(list(stream_batches(Meets(digits, (OPS,), 8, 0, 1_000_000), order, BATCH, options))) == 8


@pytest.mark.parametrize("threads", [1, 2, 6])
def test_prefetch_bounds_the_batches_loaded_ahead(digits: Store, threads: int) -> None:
    loaded, parts = [], 1 if threads == 1 else 2

    class Counts(Loader):
        def load(self, ids: np.ndarray, passes: np.ndarray, encoded: dict[int, Any]) -> Arrays:
            loaded.append(ids)
            return super().load(ids, passes, encoded)

    stream = stream_batches(
        Counts(digits, (OPS,), 8, 0, 1_000_000),
        TrainOrder(plan(digits), 0, 1, 0, 16),
        BATCH,
        replace(OPTIONS, prefetch=3, tasks=threads),
    )
    # Parts of these batches keep the threads busy while another one is taken.
    in_work = 0 if threads == 1 else threads // parts
    for taken in range(1, 6):
        next(stream)
        assert len(loaded) <= parts * (taken + 3 + 1 + in_work)  # in the queue, and waiting to be put there
    stream.close()  # type: ignore[attr-defined]


class Swaps(Loader):
    """Gives the batches of a task in another order."""

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: dict[int, Any]) -> Arrays:
        return super().load(ids[::-1].copy(), passes, encoded)


def test_batch_without_planned_ids_is_refused(digits: Store) -> None:
    with pytest.raises(RuntimeError, match="the stream is out of order"):
        next(
            stream_batches(Swaps(digits, (OPS,), 8, 0, 1_000_000), TrainOrder(plan(digits), 0, 1, 0, 8), BATCH, OPTIONS)
        )


@pytest.mark.ray
def test_ray_data_gives_the_same_batches(digits: Store, ray_local: None) -> None:
    on_ray = LoadingOptions(on_ray=True, prefetch=2, tasks=2, task_cpus=0.25)
    assert_same(train(digits, 1, 2, options=on_ray), train(digits, 1, 2))
    assert_same(train(digits, start=5, options=on_ray, windowed=True), train(digits, start=5, windowed=True))
    sweep = EvalOrder(np.arange(2, 52), 8, 1, 2, batches_per_task=2)
    assert_same(
        list(stream_batches(loader(digits), sweep, 8, on_ray)), list(stream_batches(loader(digits), sweep, 8, OPTIONS))
    )


@pytest.mark.ray
def test_crashing_task_is_retried_twice_without_deprecation_warning(
    digits: Store, ray_local: None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    import ray
    from ray.util.annotations import RayDeprecationWarning

    def load(
        self: Any, ids: np.ndarray, passes: np.ndarray, encoded: Any
    ) -> Arrays:  # by value: the tasks do not know this file
        (tmp_path / str(os.getpid())).touch()
        os._exit(1)

    its = type("Dies", (Loader,), {"load": load})(digits, (OPS,), 8, 0, 1_000_000)
    on_ray = LoadingOptions(on_ray=True, prefetch=2, tasks=2, task_cpus=0.25)
    with pytest.raises(ray.exceptions.RayError):
        next(stream_batches(its, TrainOrder(plan(digits), 0, 1, 0, 3), BATCH, on_ray))  # one task
    assert len(list(tmp_path.iterdir())) == 3
    assert not [w for w in recwarn if issubclass(w.category, RayDeprecationWarning)]

"""Images cached on the device give the batches of the stream, bit by bit."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firstlight.pipeline.config.scale import StreamOptions
from firstlight.pipeline.data import stream
from firstlight.pipeline.data.loader import Arrays, Loader, StoredImages, list_view_columns
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions, TrainOrder
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages import finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import device_cache
from firstlight.pipeline.train import loop as fit_module
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE
from firstlight.pipeline.train.training_job import to_batch
from tests.support import recipes
from tests.support.augmentations import PIPELINES
from tests.support.gloo import Pool
from tests.support.local_training import Stopped, train

CPU = torch.device("cpu")
HELD = np.arange(2, 600)  # more than are trained on
OPTIONS = LoadingOptions(on_ray=False, prefetch=2, tasks=2, task_cpus=0.25, resident=HELD)
BATCH = 12


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    device_cache._cache.clear()
    yield
    device_cache._cache.clear()


def plan(store: Store) -> BatchPlan:
    """100 ids, far apart; 8 steps, 3 to a task."""
    return BatchPlan(np.arange(3, 503, 5), store.list_row_groups("train")[:, 2], BATCH, 0, 3 * BATCH, False)


def assert_same_batches(loader: Loader, order: TrainOrder, options: LoadingOptions = OPTIONS) -> None:
    """Held, decoded by tasks, and augmented by them: the batches, as the learner gets them."""
    held, _ = device_cache.cache_images(loader, options, CPU)
    rows = BATCH // order.world
    expected = list(stream.stream_batches(loader, order, rows, replace(options, on_ray=False)))
    assert_equal_batches(list(device_cache.iterate_cached_batches(held, loader, order, options)), expected)
    assert_equal_batches(
        list(device_cache.iterate_streamed_batches(loader, order, rows, replace(options, on_device=True), CPU)),
        expected,
    )
    assert len(expected) == order.stop - order.start


def assert_equal_batches(found: list[dict[str, Any]], expected: list[Arrays]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert list_view_columns(a) == list_view_columns(b)
        for name in list_view_columns(b):
            assert a[name].dtype == torch.uint8
            assert a[name].shape == b[name].shape
        ours, theirs = to_batch(a, CPU), to_batch(b, CPU)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.passes, theirs.passes)
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(ours.views, theirs.views, strict=True))


@pytest.mark.parametrize("name", PIPELINES)
def test_cached_and_streamed_batches_are_those_of_the_stream(digits: Store, name: str) -> None:
    """Two epochs of two views, at the size of the images and at others."""
    for size in (8, 12):
        assert_same_batches(
            Loader(digits, (tuple(PIPELINES[name]),) * 2, size, 3, 1_000_000), TrainOrder(plan(digits), 0, 1, 0, 16)
        )


def test_views_of_several_sizes_are_those_of_the_stream(digits: Store) -> None:
    ops = (tuple(PIPELINES["super_and"]), tuple(PIPELINES["center_crop"]), tuple(PIPELINES["cifar"]))
    loader = Loader(digits, ops, 8, 0, 1_000_000, view_sizes=(12, 12, 5))
    assert_same_batches(loader, TrainOrder(plan(digits), 0, 1, 0, 16))


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_gets_its_part(digits: Store, world: int) -> None:
    loader = Loader(digits, (tuple(PIPELINES["super_and"]), tuple(PIPELINES["center_crop"])), 8, 0, 1_000_000)
    for rank in range(world):
        assert_same_batches(loader, TrainOrder(plan(digits), rank, world, 0, 16))


def test_batches_from_any_start_step_are_the_same(digits: Store) -> None:
    loader = Loader(digits, (tuple(PIPELINES["cifar"]),), 8, 0, 1_000_000)
    for start in range(17):
        assert_same_batches(loader, TrainOrder(plan(digits), 0, 1, start, 16))


@pytest.mark.ray
def test_batches_decoded_by_ray_data_are_the_same(digits: Store, ray_local: None) -> None:
    loader = Loader(digits, (tuple(PIPELINES["cifar"]),), 8, 0, 1_000_000)
    assert_same_batches(loader, TrainOrder(plan(digits), 0, 1, 0, 16), replace(OPTIONS, on_ray=True))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of every image that is decoded to be held."""
    seen: list[int] = []
    real = StoredImages.load

    def load(self: StoredImages, ids: np.ndarray, passes: np.ndarray, encoded: Any) -> Any:
        seen.extend(ids.tolist())
        return real(self, ids, passes, encoded)

    monkeypatch.setattr(StoredImages, "load", load)
    return seen


def test_images_are_decoded_once_for_all_trainings(digits: Store, decoded: list[int]) -> None:
    loader = Loader(digits, (tuple(PIPELINES["cifar"]),), 8, 0, 1_000_000)
    held, notes = device_cache.cache_images(loader, OPTIONS, CPU)
    assert decoded == HELD.tolist()
    assert notes == ["598 images of 8 x 8 are held decoded (0.1 MB on cpu)"]
    again, notes = device_cache.cache_images(replace(loader, seed=9, ops=()), OPTIONS, CPU)
    assert again is held
    assert notes == []
    device_cache.cache_images(loader, replace(OPTIONS, resident=HELD[1:]), CPU)
    assert decoded == [*HELD.tolist(), *HELD[1:].tolist()]
    assert len(device_cache._cache) == 1, "what is not used any more is still held"


def test_image_that_is_not_cached_raises(digits: Store) -> None:
    loader = Loader(digits, (tuple(PIPELINES["cifar"]),), 8, 0, 1_000_000)
    held, _ = device_cache.cache_images(loader, OPTIONS, CPU)
    for ids in ([1, 5], [5, 700]):
        with pytest.raises((AssertionError, IndexError)):
            held.build_batch(np.array(ids), np.zeros(len(ids), np.int64), loader)


def cache_on_this_rank(store: str, count: int) -> tuple[str, int]:
    """A hash of all that is held, and how many images this rank has decoded."""
    device_cache._cache.clear()
    loader = Loader(Store.open(Path(store)), ((),), 8, 0, 1_000_000)
    before, seen = StoredImages.load, []

    def load(self: StoredImages, ids: np.ndarray, passes: np.ndarray, encoded: Any) -> Any:
        seen.append(len(ids))
        return before(self, ids, passes, encoded)

    StoredImages.load = load  # type: ignore[method-assign]
    try:
        held, _ = device_cache.cache_images(loader, replace(OPTIONS, resident=HELD[:count]), CPU)
    finally:
        StoredImages.load = before  # type: ignore[method-assign]
        device_cache._cache.clear()
    return hashlib.sha256(held.pixels.numpy().tobytes() + held.labels.tobytes()).hexdigest(), sum(seen)


@pytest.mark.parametrize("count", [598, 1])
def test_each_worker_decodes_a_part_and_caches_all(pool: Pool, digits: Store, count: int) -> None:
    alone, _ = cache_on_this_rank(str(digits.path), count)
    answers = pool.run(cache_on_this_rank, str(digits.path), count)
    assert [found for found, _ in answers] == [alone, alone]
    assert [seen for _, seen in answers] == [count - count // 2, count // 2]


SEVERAL = {"width": [3, 50], "height": [4, 60], "modes": {}}


@pytest.mark.parametrize(
    ("settings", "images", "complaint"),
    [
        ({}, SEVERAL, "it needs images of one size, these are 3 to 50 pixels wide and 4 to 60 high; valid: auto, off"),
        ({}, {}, "it needs images of one size"),
        (
            {"resident_mb": 1},
            {"width": [100, 100], "height": [50, 50]},
            "100 images of 100 x 50 take 2 MB, more than stream.resident_mb: 1; valid",
        ),
    ],
)
def test_images_that_cannot_be_cached_are_streamed_or_refused(
    digits: Store, settings: dict[str, Any], images: dict[str, Any], complaint: str
) -> None:
    store = replace(digits, images=images)
    assert not device_cache.should_cache(StreamOptions(**settings), store, 100)
    assert not device_cache.should_cache(StreamOptions(**settings, resident="off"), store, 100)
    with pytest.raises(UserError, match=f"^stream.resident: 'on' is not possible: {complaint}"):
        device_cache.should_cache(StreamOptions(**settings, resident="on"), store, 100)


def test_auto_explains_why_it_streams(digits: Store) -> None:
    store = replace(digits, images=SEVERAL)
    obstacle = "it needs images of one size, these are 3 to 50 pixels wide and 4 to 60 high"
    why = f"stream.resident: auto streams the images: {obstacle}"
    assert [
        device_cache.explain_streaming(StreamOptions(resident=mode), store, 100) for mode in ("auto", "on", "off")
    ] == [
        [why],
        [],
        [],
    ]  # type: ignore[arg-type]
    assert device_cache.explain_streaming(StreamOptions(), digits, 100) == []


def test_images_are_cached_unless_resident_is_off(digits: Store) -> None:
    assert digits.common_size == (8, 8)
    assert [device_cache.should_cache(StreamOptions(resident=mode), digits, 100) for mode in ("auto", "on", "off")] == [
        True,
        True,
        False,
    ]  # type: ignore[arg-type]


def test_images_of_several_sizes_cannot_be_augmented_on_the_device(digits: Store) -> None:
    assert [
        device_cache.should_augment_on_device(StreamOptions(augment=place), digits) for place in ("cpu", "device")
    ] == [
        False,
        True,
    ]  # type: ignore[arg-type]
    store = replace(digits, images=SEVERAL)
    assert not device_cache.should_augment_on_device(StreamOptions(), store)
    obstacle = "it needs images of one size, these are 3 to 50 pixels wide and 4 to 60 high; valid: cpu$"
    with pytest.raises(UserError, match=f"^stream.augment: 'device' is not possible: {obstacle}"):
        device_cache.should_augment_on_device(StreamOptions(augment="device"), store)


STREAMED: dict[str, Any] = {"stream__resident": "off"}
DECODED: dict[str, Any] = {**STREAMED, "stream__augment": "device"}
AUGMENTED: dict[str, Any] = {"dataset__train_augment": PIPELINES["super_and"]}


def test_trainings_are_bit_identical_in_all_modes_and_across_them(tmp_path: Path, digits: Store) -> None:
    streamed, _ = train(tmp_path / "streamed", digits, **AUGMENTED, **STREAMED)
    assert train(tmp_path / "held", digits, **AUGMENTED)[0] == streamed
    assert train(tmp_path / "decoded", digits, **AUGMENTED, **DECODED)[0] == streamed
    for first, then in (({}, STREAMED), (DECODED, {})):
        folder = tmp_path / f"mixed{len(first)}"
        with pytest.raises(Stopped):
            train(folder, digits, 4, **AUGMENTED, **first)
        assert train(folder, digits, **AUGMENTED, **then)[0] == streamed
    is_cached = {
        name: "are held decoded" in (tmp_path / name / "job" / METRICS_FILE).read_text()
        for name in ("streamed", "held")
    }
    assert is_cached == {"streamed": False, "held": True}


def train_on_this_rank(folder: str, store: str, mode: str) -> str:
    return train(Path(folder) / mode, Store.open(Path(store)), stream__resident=mode)[0]


def test_two_workers_are_bit_identical_in_both_modes(pool: Pool, tmp_path: Path, digits: Store) -> None:
    ends = [pool.run(train_on_this_rank, str(tmp_path), str(digits.path), mode) for mode in ("on", "off")]
    assert len({end for both in ends for end in both}) == 1


def test_trainings_of_a_stage_decode_once_with_the_same_result(
    tmp_path: Path, digits: Store, decoded: list[int]
) -> None:
    results = {}
    for mode in ("on", "off"):
        worker = StageContext.create(recipes.recipe(tmp_path / mode, stream__resident=mode), digits, on_ray=False)
        stage: Any = worker.recipe.stages["finetune"]
        for name in ("scratch-lr0.1", "scratch-lr0.3"):
            task = finetune._build_task(worker, stage, StageInstance("finetune", 0, "f", tmp_path), "scratch")
            job = finetune._build_job(
                worker, stage, StageInstance("finetune", 0, "f", tmp_path), tmp_path / mode / name, 0.1
            )
            fit_module.fit(job, task)
            results[mode, name] = torch.cat([p.flatten() for p in task.parameters()])
    assert sorted(decoded) == worker.splits.train.tolist()
    assert torch.equal(results["on", "scratch-lr0.3"], results["off", "scratch-lr0.3"])

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
from firstlight.pipeline.data import store as store_module
from firstlight.pipeline.data import stream
from firstlight.pipeline.data.loader import Arrays, Loader, StoredImages, list_view_columns
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions, TrainOrder
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.finetuning.arms import build_arm_task
from firstlight.pipeline.stages.finetuning.job import build_finetune_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import device_cache
from firstlight.pipeline.train import loop as fit_module
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.held import budget
from firstlight.pipeline.train.metrics import METRICS_FILE
from firstlight.pipeline.train.training_job import to_batch
from tests.support import recipes
from tests.support.augmentations import CROP, PIPELINES
from tests.support.compiled_views import use_compiled_ops
from tests.support.gloo import Pool
from tests.support.loaded_ids import record_loaded_ids
from tests.support.local_training import Stopped, train
from tests.support.photograph_folders import prepare_photographs, write_photographs

CPU = torch.device("cpu")
HELD = np.arange(2, 600)  # more than are trained on
OPTIONS = LoadingOptions(on_ray=False, prefetch=2, tasks=2, task_cpus=0.25, resident=HELD)
# The ids of `plan`, and as many others.
SCATTERED = replace(OPTIONS, resident=HELD[(HELD - 3) % 5 < 2])
BATCH = 12


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    device_cache._cache.clear()
    yield
    device_cache._cache.clear()


def plan(store: Store) -> BatchPlan:
    """100 ids, far apart; 8 steps, 3 to a task."""
    return BatchPlan(np.arange(3, 503, 5), store.list_row_groups("train")[:, 2], BATCH, 0, 3 * BATCH, False)


def assert_same_batches(loader: Loader, order: TrainOrder, options: LoadingOptions = SCATTERED) -> None:
    """Held, decoded by tasks, and augmented by them: the batches, as the learner gets them; then by compiled ops."""
    held, _ = device_cache.cache_images(loader, options, CPU)
    rows, on_device = BATCH // order.world, replace(options, on_device=True)
    with use_compiled_ops(False):
        expected = list(stream.stream_batches(loader, order, rows, replace(options, on_ray=False)))
        assert_equal_batches(list(device_cache.iterate_cached_batches(held, loader, order, options)), expected)
        found = list(device_cache.iterate_streamed_batches(loader, order, rows, on_device, CPU))
        assert_equal_batches(found, expected)
    with use_compiled_ops(True):
        for ours, theirs in zip(
            stream.stream_batches(loader, order, rows, replace(options, on_ray=False)), expected, strict=True
        ):
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        assert_equal_batches(list(device_cache.iterate_cached_batches(held, loader, order, options)), expected)
        found = list(device_cache.iterate_streamed_batches(loader, order, rows, on_device, CPU))
        assert_equal_batches(found, expected)
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
    """Two views at the end of an epoch and at the start of the next, at the size of the images and at others.

    The ops after the central crop, which is tested at both sizes itself, are tested at one size.
    """
    follows_crop = len(PIPELINES[name]) > 1 and PIPELINES[name][0] == CROP
    for size in (12,) if follows_crop else (8, 12):
        assert_same_batches(
            Loader(digits, (tuple(PIPELINES[name]),) * 2, size, 3, 1_000_000), TrainOrder(plan(digits), 0, 1, 6, 10)
        )


@pytest.mark.parametrize("name", ["simclr", "erased by noise", "fixmatch"])
def test_batches_of_coloured_images_are_those_of_the_stream(name: str, tmp_path: Path) -> None:
    """The digits of the other tests are gray, and are held with one channel."""
    folder = write_photographs(tmp_path / "photographs", 60, sizes=((24, 20),))
    store = prepare_photographs(folder, tmp_path / "stores", 20)
    assert store.common_size == (24, 20)
    assert not store.is_gray
    loader = Loader(store, (tuple(PIPELINES[name]),) * 2, 16, 3, 1_000_000)
    options = replace(OPTIONS, resident=store.ids("train"))
    assert_same_batches(loader, TrainOrder(plan_photographs(store), 0, 1, 0, 5), options)


@pytest.mark.parametrize(("size", "views", "shape"), [(8, 1, (BATCH, 1, 8, 8, 3)), (4, 2, (BATCH, 2, 4, 4, 3))])
def test_tasks_send_images_or_crops_whichever_are_smaller(
    digits: Store, monkeypatch: pytest.MonkeyPatch, size: int, views: int, shape: tuple[int, ...]
) -> None:
    """Digits of 8 x 8 pixels: decoded for a view of this size, cropped for two of a quarter of it."""
    sent: list[Arrays] = []
    real = stream.stream_batches

    def keep(*arguments: Any) -> Iterator[Arrays]:
        for arrays in real(*arguments):
            sent.append(arrays)
            yield arrays

    monkeypatch.setattr(stream, "stream_batches", keep)
    loader = Loader(digits, (tuple(PIPELINES["super_and"]),) * views, size, 0, 1_000_000)
    order, options = TrainOrder(plan(digits), 0, 1, 0, 2), replace(OPTIONS, on_device=True)
    found = list(device_cache.iterate_streamed_batches(loader, order, BATCH, options, CPU))
    assert [arrays["views"].shape for arrays in sent] == [shape] * 2
    assert_equal_batches(found, list(real(loader, order, BATCH, options)))


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
        # More steps than a task has.
        assert_same_batches(loader, TrainOrder(plan(digits), 0, 1, start, min(start + 4, 16)))


@pytest.mark.ray
def test_batches_decoded_by_ray_data_are_the_same(digits: Store, ray_local: None) -> None:
    loader = Loader(digits, (tuple(PIPELINES["cifar"]),), 8, 0, 1_000_000)
    assert_same_batches(loader, TrainOrder(plan(digits), 0, 1, 0, 16), replace(OPTIONS, on_ray=True))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of every image that is decoded to be held."""
    return record_loaded_ids(monkeypatch, StoredImages)


def test_images_are_decoded_once_for_all_trainings(digits: Store, decoded: list[int]) -> None:
    loader = Loader(digits, (tuple(PIPELINES["cifar"]),), 8, 0, 1_000_000)
    held, notes = device_cache.cache_images(loader, OPTIONS, CPU)
    assert decoded == HELD.tolist()
    assert notes == ["598 images of 8 x 8 are held decoded (0.0 MB on cpu)"]
    assert isinstance(held, device_cache.CachedImages)
    assert held.pixels.shape == (598, 1, 8, 8), "they are gray"
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


# A hundred images in the bins of 3 x 4 and 50 x 60 pixels each
SEVERAL = {"width": [3, 50], "height": [4, 60], "modes": {}, "sizes": [[6, 8, 100], [22, 23, 100]]}


@pytest.mark.parametrize(
    ("settings", "images", "complaint"),
    [
        ({}, {}, "the store does not say how large its images are; valid: auto, off"),
        (
            {"resident_mb": 5},
            SEVERAL,
            "1000 images of 3 to 50 x 4 to 60 take 6 MB, more than stream.resident_mb: 5; valid: auto, off",
        ),
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
    count = int(complaint.split()[0]) if complaint[0].isdigit() else 100
    assert not budget.should_cache(StreamOptions(**settings), store, count)
    assert not budget.should_cache(StreamOptions(**settings, resident="off"), store, count)
    with pytest.raises(UserError, match=f"^stream.resident: 'on' is not possible: {complaint}"):
        budget.should_cache(StreamOptions(**settings, resident="on"), store, count)


def test_auto_explains_why_it_streams(digits: Store) -> None:
    store = replace(digits, images=SEVERAL)
    obstacle = "100000 images of 3 to 50 x 4 to 60 take 602 MB, more than stream.resident_mb: 512"
    why = f"stream.resident: auto streams the images: {obstacle}"
    assert [
        budget.explain_streaming(StreamOptions(resident=mode), store, 100_000) for mode in ("auto", "on", "off")
    ] == [
        [why],
        [],
        [],
    ]  # type: ignore[arg-type]
    assert budget.explain_streaming(StreamOptions(), digits, 100) == []


def test_images_are_cached_unless_resident_is_off(digits: Store) -> None:
    assert digits.common_size == (8, 8)
    assert [budget.should_cache(StreamOptions(resident=mode), digits, 100) for mode in ("auto", "on", "off")] == [
        True,
        True,
        False,
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("augment", "on_gpu", "is_there"),
    [("cpu", True, False), ("device", False, True), ("auto", True, True), ("auto", False, False)],
)
def test_images_are_augmented_on_a_gpu_or_where_the_recipe_says(
    digits: Store, augment: Any, on_gpu: bool, is_there: bool
) -> None:
    several = replace(digits, images=SEVERAL)
    for store in (digits, several):
        assert budget.should_augment_on_device(StreamOptions(augment=augment), store, on_gpu) == is_there


def test_channels_of_several_sizes_cannot_be_augmented_on_the_device(digits: Store) -> None:
    store = replace(digits, images={**SEVERAL, "pixels": {"channels": 4, "bits": 16}})
    assert store.stated_pixels is not None
    assert not budget.should_augment_on_device(StreamOptions(), store, on_gpu=True)
    obstacle = r"images of .* need one size, these are 3 to 50 pixels wide and 4 to 60 high; valid: auto, cpu$"
    with pytest.raises(UserError, match=f"^stream.augment: 'device' is not possible: {obstacle}"):
        budget.should_augment_on_device(StreamOptions(augment="device"), store, on_gpu=True)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """48 JPEG images of five sizes, the larger ones stored smaller."""
    folder = tmp_path_factory.mktemp("photographs")
    store = prepare_photographs(write_photographs(folder / "photographs", 60), folder / "stores", 48)
    assert store.common_size is None
    return store


def plan_photographs(store: Store) -> BatchPlan:
    return BatchPlan(store.ids("train"), store.list_row_groups("train")[:, 2], BATCH, 0, 3 * BATCH, False)


@pytest.mark.parametrize("name", PIPELINES)
def test_images_of_several_sizes_give_the_batches_of_the_stream(photographs: Store, name: str) -> None:
    """Held by this process and augmented there, and cropped there for a device that does the rest.

    The last step of an epoch and the first of the next: 24 images of five sizes.
    """
    loader = Loader(photographs, (tuple(PIPELINES[name]),) * 3, 16, 0, 1_000_000, view_sizes=(16, 16, 9))
    order = TrainOrder(plan_photographs(photographs), 0, 1, 3, 5)
    options = replace(OPTIONS, resident=photographs.ids("train"))
    held, _ = device_cache.cache_images(loader, options, CPU)
    assert isinstance(held, device_cache.CachedRaggedImages)
    with use_compiled_ops(False):
        expected = list(stream.stream_batches(loader, order, BATCH, options))
        by_pillow = list(device_cache.iterate_cached_batches(held, loader, order, options))
    assert len(expected) == 2
    with use_compiled_ops(True):
        found = list(device_cache.iterate_cached_batches(held, loader, order, options))
    for ours, theirs in zip(by_pillow, expected, strict=True):
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
        rows = np.searchsorted(held.ids, theirs["id"]).tolist()
        opened = [held.images.open_image(row) for row in rows]
        views = device_cache.crop_views(opened, theirs["id"], theirs["pass"], loader, CPU)
        assert all(np.array_equal(views[key].numpy(), theirs[key]) for key in views)
        assert len(views) == 2
    on_device = replace(options, on_device=True)
    assert_equal_batches(list(device_cache.iterate_streamed_batches(loader, order, BATCH, on_device, CPU)), expected)


def test_images_of_several_sizes_are_decoded_once(photographs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, real = [], store_module.open_rgb
    monkeypatch.setattr(store_module, "open_rgb", lambda *args: decoded.append(1) or real(*args))
    loader = Loader(photographs, (tuple(PIPELINES["cifar"]),), 8, 0, 1_000_000)
    ids = photographs.ids("train")
    held, notes = device_cache.cache_images(loader, replace(OPTIONS, resident=ids), CPU)
    assert len(decoded) == len(ids) == 48
    assert device_cache.cache_images(replace(loader, seed=9), replace(OPTIONS, resident=ids), CPU) == (held, [])
    assert len(decoded) == 48
    assert isinstance(held, device_cache.CachedRaggedImages)
    pixels = int(held.images.sizes.prod(1).sum())
    assert notes == [f"48 images of 40 to 82 x 30 to 72 are held decoded ({4 * pixels / 1e6:,.1f} MB in this process)"]
    estimated = budget.estimate_held_bytes(photographs, 48)
    assert estimated is not None
    assert 4 * pixels <= estimated <= 1.5 * 4 * pixels


def test_a_training_on_few_images_holds_these(photographs: Store, digits: Store) -> None:
    whole = plan_photographs(photographs)
    all_held = replace(OPTIONS, resident=whole.ids, held_bytes=10**9)
    assert budget.choose_held_ids(photographs, all_held, whole) is whole.ids
    few = replace(whole, ids=whole.ids[::4])
    assert np.array_equal(budget.choose_held_ids(photographs, all_held, few), few.ids)
    too_many = replace(all_held, resident=None, held_bytes=4 * 82 * 82 * few.num_ids)
    assert np.array_equal(budget.choose_held_ids(photographs, too_many, few), few.ids)
    assert budget.choose_held_ids(photographs, too_many, whole) is None
    assert budget.choose_held_ids(photographs, replace(too_many, held_bytes=0), few) is None
    assert budget.choose_held_ids(digits, replace(OPTIONS, held_bytes=10**9), few) is HELD


def cache_photographs_on_this_rank(store: str) -> tuple[str, int]:
    device_cache._cache.clear()
    loader, seen = Loader(Store.open(Path(store)), ((),), 8, 0, 1_000_000), []
    real = store_module.open_rgb
    store_module.open_rgb = lambda *args: seen.append(1) or real(*args)  # type: ignore[assignment]
    try:
        held, _ = device_cache.cache_images(loader, replace(OPTIONS, resident=loader.store.ids("train")), CPU)
    finally:
        store_module.open_rgb = real
        device_cache._cache.clear()
    assert isinstance(held, device_cache.CachedRaggedImages)
    found = hashlib.sha256(held.images.sizes.tobytes())
    for pixels in held.images.pixels:
        found.update(pixels[:, :, :3].tobytes())
    return found.hexdigest(), len(seen)


def test_each_worker_decodes_a_part_of_images_of_several_sizes(
    pool: Pool, photographs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = cache_photographs_on_this_rank(str(photographs.path))
    answers = pool.run(cache_photographs_on_this_rank, str(photographs.path))
    assert [found for found, _ in answers] == [alone, alone]
    assert [seen for _, seen in answers] == [24, 24]


STREAMED: dict[str, Any] = {"stream__resident": "off"}
DECODED: dict[str, Any] = {**STREAMED, "stream__augment": "device"}
EVERY_IMAGE: dict[str, Any] = {"dataset__max_train": None, "dataset__max_test": None}
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


def test_trainings_on_images_of_several_sizes_are_bit_identical(tmp_path: Path, photographs: Store) -> None:
    """Streamed, held, and held after a start that was streamed."""
    small: dict[str, Any] = {**AUGMENTED, "stages__pretrain__batch_size": 12, **EVERY_IMAGE}
    streamed, _ = train(tmp_path / "streamed", photographs, **small, **STREAMED)
    assert train(tmp_path / "held", photographs, **small)[0] == streamed
    with pytest.raises(Stopped):
        train(tmp_path / "mixed", photographs, 4, **small, **STREAMED)
    assert train(tmp_path / "mixed", photographs, **small)[0] == streamed
    assert "are held decoded" in (tmp_path / "held" / "job" / METRICS_FILE).read_text()


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
        context = StageContext.create(recipes.recipe(tmp_path / mode, stream__resident=mode), digits, on_ray=False)
        stage: Any = context.recipe.stages["finetune"]
        for name in ("scratch-lr0.1", "scratch-lr0.3"):
            task = build_arm_task(context, stage, StageInstance("finetune", 0, "f", tmp_path), "scratch")
            job = build_finetune_job(
                context, stage, StageInstance("finetune", 0, "f", tmp_path), tmp_path / mode / name, 0.1
            )
            fit_module.fit(job, task)
            results[mode, name] = torch.cat([p.flatten() for p in task.parameters()])
    assert sorted(decoded) == context.splits.train.tolist()
    assert torch.equal(results["on", "scratch-lr0.3"], results["off", "scratch-lr0.3"])

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.manifest import MAX_GROUP_BYTES
from firstlight.pipeline.data.row_groups import IMAGE_CACHE_BYTES
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import memory
from firstlight.pipeline.run.memory import MemoryEstimate, compare_memory, estimate_memory, free_memory
from tests.support import recipes

LOCAL: dict[str, Any] = {
    "scale__workers": 2,
    "scale__cpus": 4,
    "scale__cpus_per_worker": 1.0,
    "stream__resident": "off",
}


def recipe(**changes: Any) -> Recipe:
    return recipes.recipe(Path("unused"), **{**LOCAL, **changes})


def estimated(store: Store, images: int = 1000, **changes: Any) -> MemoryEstimate:
    return estimate_memory(recipe(**changes), store, images)


def large(store: Store, images: int, image_bytes: int) -> Store:
    """Returns the store as if it held so many images, of 400 x 300 pixels."""
    shard = replace(store.shards[0], count=images, bytes=images * image_bytes)
    return replace(store, shards=(shard,), images={"width": [200, 400], "height": [300, 300]})


def test_stream_memory_equals_a_sum_by_hand(digits: Store) -> None:
    """Two workers have two tasks each: three blocks of 1,024 images of 8 x 8, one being read, four batches of 256."""
    row = 8 * 8 * 3
    assert estimated(digits).in_flight == 2 * ((3 * 2 + 1) * 1024 * row + 4 * 256 * row)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"stream__prefetch": 8}, "in_flight"),
        ({"stream__tasks": 3}, "in_flight"),
        ({"dataset__image_size": 16}, "in_flight"),
        (
            {"stages__pretrain__method": {"name": "super_and", "rounds": 1}, "stages__pretrain__batch_size": 2048},
            "in_flight",
        ),
        ({"stages__evaluate__batch_size": 4096}, "workers"),
        ({"scale__workers": 3}, "workers"),
        ({"stream__tasks": 3}, "tasks"),
        ({"scale__object_store_mb": 400}, "object_store"),
        ({"stream__resident": "on"}, "held"),
        ({"stages__pretrain__method__dim": 64}, "tables"),
    ],
)
def test_each_key_changes_its_part_of_the_estimate(digits: Store, changes: dict[str, Any], part: str) -> None:
    assert getattr(estimated(digits, **changes), part) > getattr(estimated(digits), part)


def test_tables_of_the_method_are_counted(digits: Store) -> None:
    """The target that an image holds, 8 bytes, and a target of 8 numbers of 4 bytes."""
    assert estimated(digits, images=1_000_000).tables == 1_000_000 * (8 + 8 * 4)
    contrast = {"name": "spatial_contrasting", "patch_size": 1}
    assert estimated(digits, images=1_000_000, stages__pretrain__method=contrast).tables == 0


def test_decoded_images_count_per_worker_and_not_on_gpus(digits: Store) -> None:
    """Views of all images that are scored are held as well, in the memory of the worker."""
    views = sum(digits.splits.values()) * 8 * 8 * 3
    assert estimated(digits, stream__resident="on").held == 2 * (1000 * 8 * 8 + views)
    assert estimated(digits, stream__resident="on", scale__gpus_per_worker=1.0).held == 2 * views
    several = replace(digits, images={"width": [3, 50], "height": [4, 60], "sizes": [[22, 23, 10]]})
    for gpus in (0.0, 1.0):
        found = estimated(several, images=100, stream__resident="on", scale__gpus_per_worker=gpus)
        assert found.held == 2 * (100 * 50 * 60 * 4 + views)
    few = estimated(digits, stream__resident="auto", stream__resident_mb=1, images=10**6)
    assert few.held == 2 * min(views, 500_000)


@pytest.mark.fault(12, "a window larger than a task's cache")
def test_decoding_task_holds_its_window_up_to_the_cache(digits: Store) -> None:
    """1,000,000 images of 20 kB: the window is cut at 128 MB, beside as many in the cache."""
    few, many = (estimated(large(digits, 1_000_000, 20_000), stream__window=window).tasks for window in (1, 2048))
    assert (many - few) // 4 == 2047 * 20_000
    full, more = (
        estimated(large(digits, 1_000_000, 20_000), stream__window=window).tasks for window in (100_000, 200_000)
    )
    assert full == more
    assert (
        full // 4 - memory.TASK_BYTES - 2 * IMAGE_CACHE_BYTES - MAX_GROUP_BYTES
        == 2 * 400 * 300 * 3 + 4 * 1024 * 8 * 8 * 3
    )


def test_decoding_task_memory_does_not_grow_with_the_store(digits: Store) -> None:
    small_set, large_set = (estimated(large(digits, count, 20_000)) for count in (100_000, 10_000_000))
    assert replace(small_set, tables=0) == replace(large_set, tables=0)


@pytest.mark.fault(12, "more memory needed than is free")
def test_estimate_that_fits_exactly_is_accepted(digits: Store) -> None:
    its, needed = recipe(), estimated(digits)
    compare_memory(its, needed, needed.total)
    with pytest.raises(
        UserError,
        match=r"^scale\.workers: 2 is not valid: of [\d,]+ MB of memory that are free, "
        r"[\d,]+ MB would be needed: object",
    ) as told:
        compare_memory(its, needed, needed.total - 1)
    assert len(str(told.value).splitlines()) == 1
    assert str(told.value).endswith(
        "valid: less, or less of stream.tasks (2), scale.object_store_mb (300), stream.resident_mb (512)"
    )


def test_largest_part_is_named_first(digits: Store) -> None:
    for changes, named in (
        ({"stream__tasks": 12}, "stream.tasks: 12"),
        ({"scale__object_store_mb": 8000}, "scale.object_store_mb: 8000"),
    ):
        with pytest.raises(UserError, match=f"^{named} is not valid"):
            compare_memory(recipe(**changes), estimated(digits, **changes), 10**9)


@pytest.mark.fault(11, "object store too small for the batches on their way")
def test_too_small_object_store_is_refused(digits: Store) -> None:
    changes = {"dataset__image_size": 64, "stream__prefetch": 40, "scale__object_store_mb": 100}
    needed = estimated(digits, **changes)
    with pytest.raises(UserError) as told:
        compare_memory(recipe(**changes), needed, 10**12)
    megabytes = -(-needed.in_flight // 2**20)
    assert str(told.value) == (
        f"scale.object_store_mb: 100 is less than the {megabytes} MB "
        "that decoded images on their way to 2 workers take; "
        f"valid: at least {megabytes}, or a smaller stream.prefetch (40), stream.tasks (2) or batch_size"
    )
    compare_memory(
        recipe(**{**changes, "scale__object_store_mb": megabytes}),
        needed=replace(needed, object_store=megabytes * 2**20),
        free=10**12,
    )


def test_only_the_local_machine_is_checked(digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    memory.check_memory(recipe(scale__workers=0), digits, 1000)
    memory.check_memory(recipe(scale__address="auto", scale__cpus=None), digits, 1000)
    with pytest.raises(UserError, match="MB of memory that are free"):
        memory.check_memory(recipe(), digits, 1000)


def test_memory_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP_FOLDER", tmp_path)
    assert abs(free_memory() - psutil.virtual_memory().available) < 2 * 10**9
    (tmp_path / "memory.stat").write_text("anon 300\nfile 500\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory() == 700, "what files have in memory can be had back"
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 1000


def test_estimate_is_described_in_one_line(digits: Store) -> None:
    text = str(estimated(digits))
    assert text.startswith("object store 315 MB (decoded images on their way ")
    assert text.endswith("Ray 1,300 MB")


@pytest.mark.parametrize(("free", "tasks"), [(10**12, 16), (900_000_000, 6), (100_000_000, 2)])
def test_chosen_tasks_have_room_in_the_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, tasks: int
) -> None:
    """Batches of 256 images of 224 x 224, 38.5 MB each: three for each task, and five besides."""
    monkeypatch.setattr(memory, "free_memory", lambda: 10**12)
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    changes = {"dataset__image_size": 224, "stages__evaluate__batch_size": 256, "scale__workers": 1}
    its = recipe(**changes)
    assert memory.choose_tasks(its, 16) == tasks
    if tasks > memory.RAY_TASKS:
        assert memory.choose_object_store(its, tasks) * 2**20 <= free + 2**20
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path / "none")
    assert memory.choose_tasks(its, 16) == 16
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path)
    assert memory.choose_tasks(recipe(**{**changes, "scale__workers": 0}), 16) == 16, "threads share nothing"

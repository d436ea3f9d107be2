"""The context of a stage: its loaders and batches, on one worker and on two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firstlight.pipeline.data.order.lane_plan import LanePlan
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.train import context as context_module
from firstlight.pipeline.train.context import StageContext, gather_rows
from tests.support import recipes
from tests.support.gloo import Pool


def make_context(folder: Path, store: Store, **changes: Any) -> StageContext:
    return StageContext.create(recipes.recipe(folder, **changes), store, on_ray=False)


def gather_on_this_rank(folder: str, store: str, count: int) -> tuple[list[int], list[int]]:
    """Returns the ids that this rank has read, and those that all ranks have gathered."""
    context = make_context(Path(folder), Store.open(Path(store)))
    parts = [batch.ids for batch in context.iterate_batches(context.splits.train[:count], 16)]
    own = [int(image) for part in parts for image in part]
    return own, gather_rows(parts, count).tolist()


@pytest.mark.parametrize("count", [2, 50, 51])
def test_workers_read_parts_and_gather_rows_in_the_order_of_ids(
    pool: Pool, tmp_path: Path, digits: Store, count: int
) -> None:
    ids = make_context(tmp_path, digits).splits.train[:count].tolist()
    (first, gathered), (second, gathered_too) = pool.run(gather_on_this_rank, str(tmp_path), str(digits.path), count)
    assert first + second == ids
    assert 0 <= len(first) - len(second) <= 1
    assert gathered == gathered_too == ids


def test_one_worker_reads_all_ids_in_order(tmp_path: Path, digits: Store) -> None:
    context = make_context(tmp_path, digits)
    batches = list(context.iterate_batches(context.splits.train[:40], 16))
    assert [len(batch.ids) for batch in batches] == [16, 16, 8]
    assert torch.cat([batch.ids for batch in batches]).tolist() == context.splits.train[:40].tolist()
    assert all((batch.labels >= 0).all() for batch in batches)


@pytest.mark.parametrize(("threads", "asked", "tasks"), [(1, "auto", 1), (12, "auto", 3), (12, 2, 2)])
def test_decoding_threads_follow_the_threads_of_the_network(
    tmp_path: Path, digits: Store, threads: int, asked: int | str, tasks: int
) -> None:
    assert make_context(tmp_path, digits, scale__threads=threads, stream__tasks=asked).options.tasks == tasks


def test_default_views_are_the_evaluation_augmentation(tmp_path: Path, digits: Store) -> None:
    context = make_context(tmp_path, digits)
    ids = context.splits.train[:5]
    (batch,) = context.iterate_batches(ids, 5)
    (plain,) = context.iterate_batches(ids, 5, [context.recipe.dataset.eval_augment])
    (moved,) = context.iterate_batches(ids, 5, [context.recipe.dataset.train_augment])
    assert torch.equal(batch.views[0], plain.views[0])
    assert not torch.equal(batch.views[0], moved.views[0])


@pytest.mark.parametrize(("shuffle", "windowed"), [("windowed", True), ("global", False), ("auto", False)])
def test_shuffle_decides_the_order_of_a_small_store(
    tmp_path: Path, digits: Store, shuffle: str, windowed: bool
) -> None:
    context = make_context(tmp_path, digits, stream__shuffle=shuffle)
    plan = context.build_plan(context.splits.train, 32, 0)
    assert isinstance(plan, BatchPlan)
    assert plan.windowed == windowed


def test_lanes_are_chosen_by_name_and_for_many_images(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, auto = make_context(tmp_path, digits, stream__shuffle="lanes"), make_context(tmp_path, digits)
    ids = auto.splits.train
    chosen = named.build_plan(ids, 32, 0)
    assert isinstance(chosen, LanePlan)
    assert np.array_equal(chosen.ids, ids)
    monkeypatch.setattr(context_module, "LANE_PLAN_IMAGES", len(ids))
    assert auto.build_plan(ids, 32, 0) == chosen
    monkeypatch.setattr(context_module, "LANE_PLAN_IMAGES", len(ids) + 1)
    assert isinstance(auto.build_plan(ids, 32, 0), BatchPlan)


def test_window_holds_at_most_the_image_cache(tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is larger than the cache is read by windows, which fit the cache."""
    per_image = sum(shard.bytes for shard in digits.shards) // sum(shard.count for shard in digits.shards)
    monkeypatch.setattr(context_module, "IMAGE_CACHE_BYTES", 20 * per_image)
    plan = make_context(tmp_path, digits).build_plan(np.arange(100), 10, 0)
    assert isinstance(plan, BatchPlan)
    assert plan.windowed
    assert plan.window == 20


def test_stream_resident_on_that_is_not_possible_raises(tmp_path: Path, digits: Store) -> None:
    store = replace(digits, images={"width": [3, 50], "height": [4, 60]})
    with pytest.raises(UserError, match=r"^stream.resident: 'on' is not possible: the store does not say how large"):
        make_context(tmp_path, store, stream__resident="on")

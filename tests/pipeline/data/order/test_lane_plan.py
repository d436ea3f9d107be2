"""The order of very many images: what holds of the other plans, small memory, and ranks that read their own lanes."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.data.order import lane_plan as module
from firstlight.pipeline.data.order.id_set import make_id_set
from firstlight.pipeline.data.order.lane_plan import LanePlan
from firstlight.pipeline.data.plan import BatchPlan, SemiSupervisedPlan
from firstlight.pipeline.data.stream import TrainOrder

GROUP = 128
# The first ids of an epoch of `plan(1000, 32)`, and the sum of the ids of another times their places.
FIRST_IDS = [1732, 1734, 598, 1308, 1420, 1426, 1494, 306]
WEIGHTED_SUM = 486083920


def plan(n: int, batch: int, seed: int = 0, window: int = 128, group: int = 50, every: int = 2) -> LanePlan:
    """A plan over every other id; the rest is held out."""
    return LanePlan(make_id_set(np.arange(0, every * n, every)), np.arange(0, every * n, group), batch, seed, window)


sizes = st.tuples(st.integers(1, 300), st.integers(1, 40)).filter(lambda t: t[0] >= t[1])


@given(sizes, st.integers(1, 400), st.integers(1, 90), st.integers(0, 5))
def test_epoch_has_every_image_once_except_the_tail(size: tuple[int, int], window: int, group: int, epoch: int) -> None:
    p = plan(*size, window=window, group=group)
    assert sorted([*p.epoch(epoch).ravel(), *p.tail(epoch)]) == p.ids.tolist()
    assert len(p.tail(epoch)) < p.batch_size
    assert p.epoch(epoch).shape == p.passes(epoch).shape == (p.steps, p.batch_size)


@given(sizes, st.integers(1, 400), st.integers(0, 40))
def test_part_of_an_epoch_leaves_out_the_images_of_its_other_steps(
    size: tuple[int, int], window: int, steps: int
) -> None:
    p = plan(*size, window=window)
    assert sorted([*p.epoch(1)[:steps].ravel(), *p.tail(1, steps)]) == p.ids.tolist()


@pytest.mark.parametrize("batch", [32, 2048])
def test_global_batches_do_not_depend_on_number_of_workers(batch: int) -> None:
    p = plan(10 * batch, batch, window=3 * batch)
    for step in range(p.steps):
        whole = p.epoch(3)[step]
        for world in (1, 2, 4, 32):
            assert np.array_equal(np.concatenate([p.slice(3, step, r, world)[0] for r in range(world)]), whole)


@pytest.mark.parametrize("world", [1, 4])
def test_tasks_of_a_rank_give_its_part_of_every_step_from_any_start(world: int) -> None:
    p = plan(10_000, 512, window=2048)
    assert (p.window_steps, p.count_task_steps(1), p.count_task_steps(4)) == (8, 4, 8)
    for start in (0, 13, p.steps + 1):
        order = TrainOrder(p, world - 1, world, start, 2 * p.steps)
        found = [batch for k in range(len(order)) for batch in order.list_batches(k)]
        expected = [p.slice(*divmod(step, p.steps), world - 1, world) for step in range(start, 2 * p.steps)]
        assert [ids.tolist() for ids, _ in found] == [ids.tolist() for ids, _ in expected]
        assert [passes.tolist() for _, passes in found] == [passes.tolist() for _, passes in expected]


def test_epoch_is_a_function_of_seed_and_number() -> None:
    p, again = plan(1000, 32), pickle.loads(pickle.dumps(plan(1000, 32)))
    assert np.array_equal(p.epoch(2), again.epoch(2))
    assert p == again
    assert not np.array_equal(p.epoch(2), p.epoch(3))
    other = plan(1000, 32, seed=1)
    assert other != p
    assert not np.array_equal(other.epoch(2), p.epoch(2))
    assert len({tuple(p.tail(epoch)) for epoch in range(5)}) > 1
    assert len({p.key, plan(1000, 16).key, plan(1000, 32, window=64).key, plan(999, 32).key}) == 4


def test_the_order_does_not_change_between_versions() -> None:
    """A training that is resumed, or repeated from its record, has the same batches."""
    p = plan(1000, 32)
    assert p.epoch(0)[0][:8].tolist() == FIRST_IDS
    assert int((p.epoch(1) * np.arange(p.epoch(1).size).reshape(p.epoch(1).shape)).sum()) == WEIGHTED_SUM


def test_positions_are_those_among_the_ids() -> None:
    p = plan(100, 10)
    assert p.num_ids == 100
    assert p.find_positions(np.array([0, 2, 198, 1, 200])).tolist() == [0, 1, 99, -1, -1]


def test_a_window_of_many_workers_reads_few_images_more_than_it_uses() -> None:
    """With the lanes of `BatchPlan`, each of 64 workers reads the windows of three others too."""
    world, batch = 64, 64 * 256
    ids = np.arange(24 * batch)
    starts = np.arange(0, len(ids), GROUP)
    ratios = []
    for p in (LanePlan(make_id_set(ids), starts, batch, 0, 2048), BatchPlan(ids, starts, batch, 0, 2048, True)):
        order = TrainOrder(p, 17, world, 0, p.steps)
        tasks = [np.concatenate([ids for ids, _ in order.list_batches(k)]) for k in range(len(order))]
        ratios.append(sum(GROUP * len(np.unique(task // GROUP)) for task in tasks) / sum(map(len, tasks)))
    assert ratios[0] < 1.35
    assert ratios[1] > 4


def test_batches_mix_as_many_row_groups_as_windows_do() -> None:
    ids, starts = np.arange(100_000), np.arange(0, 100_000, GROUP)
    lanes, windows = LanePlan(make_id_set(ids), starts, 256, 0, 2048), BatchPlan(ids, starts, 256, 0, 2048, True)
    counts = [np.mean([len(np.unique(batch // GROUP)) for batch in p.epoch(0)]) for p in (lanes, windows)]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)
    assert abs(np.corrcoef(lanes.epoch(0).ravel(), np.arange(390 * 256))[0, 1]) < 0.2


@pytest.mark.parametrize("held_out", [False, True])
def test_ten_million_images_take_a_few_megabytes(held_out: bool) -> None:
    count = 10_000_000
    ids = np.flatnonzero(np.arange(count) % 100) if held_out else np.arange(count)
    tracemalloc.start()
    try:
        p = LanePlan(make_id_set(ids), np.arange(0, count, GROUP), 8192, 0, 2048)
        for epoch in range(3):
            p.slice(epoch, 5, 1, 32)
        assert tracemalloc.get_traced_memory()[0] < 6_000_000
    finally:
        tracemalloc.stop()
        module._order_groups.cache_clear()
        module._draw_window.cache_clear()
    assert len(pickle.dumps(p)) < 3_000_000


@given(st.integers(1, 30), st.integers(40, 200), st.integers(1, 12), st.integers(1, 12))
def test_batches_with_labelled_images_are_those_of_the_parts(labelled: int, rest: int, r: int, others: int) -> None:
    few = 3 * np.arange(labelled)
    many = np.setdiff1d(np.arange(10_000), few)[:rest]
    starts = np.arange(0, 10_000, 50)
    r = min(r, labelled)
    p = SemiSupervisedPlan(BatchPlan(few, starts, r, 0, 64, False), LanePlan(make_id_set(many), starts, others, 0, 64))
    assert p.ids.tolist() == np.union1d(few, many).tolist()
    for step in range(p.steps):
        rows, passes = p.epoch(1)[step], p.passes(1)[step]
        for world in (k for k in (1, 2, 3) if p.batch_size % k == 0):
            parts = [p.slice(1, step, rank, world) for rank in range(world)]
            assert np.concatenate([ids for ids, _ in parts]).tolist() == rows.tolist()
            assert np.concatenate([its for _, its in parts]).tolist() == passes.tolist()
        assert np.isin(rows, few).sum() == r

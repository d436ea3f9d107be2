import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.data.plan import BatchPlan, SemiSupervisedPlan


def plan(
    n: int = 1000, batch: int = 32, seed: int = 0, windowed: bool = True, window: int = 128, group: int = 50
) -> BatchPlan:
    ids = np.arange(0, 2 * n, 2)  # every other image: the rest is held out
    return BatchPlan(ids, np.arange(0, 2 * n, group), batch, seed, window, windowed)


sizes = st.tuples(st.integers(1, 300), st.integers(1, 40)).filter(lambda t: t[0] >= t[1])


@given(sizes, st.booleans(), st.integers(1, 400), st.integers(1, 90), st.integers(0, 5))
def test_epoch_has_every_image_once_except_the_tail(
    size: tuple[int, int], windowed: bool, window: int, group: int, epoch: int
) -> None:
    p = plan(*size, windowed=windowed, window=window, group=group)
    seen, tail = p.epoch(epoch).ravel(), p.tail(epoch)
    assert sorted([*seen, *tail]) == p.ids.tolist()
    assert len(tail) < p.batch_size
    assert p.epoch(epoch).shape == (p.steps, p.batch_size)


@pytest.mark.parametrize("windowed", [True, False])
def test_global_batches_do_not_depend_on_number_of_workers(windowed: bool) -> None:
    p = plan(windowed=windowed)
    for step in range(p.steps):
        whole = p.epoch(3)[step]
        for world in (1, 2, 4, 8):
            assert np.array_equal(np.concatenate([p.slice(3, step, r, world)[0] for r in range(world)]), whole)


@pytest.mark.parametrize("windowed", [True, False])
def test_epoch_is_a_function_of_seed_and_number(windowed: bool) -> None:
    again = plan(windowed=windowed)
    assert np.array_equal(plan(windowed=windowed).epoch(2), again.epoch(2))
    assert not np.array_equal(again.epoch(2), again.epoch(3))
    assert not np.array_equal(again.epoch(2), plan(windowed=windowed, seed=1).epoch(2))


def test_task_reads_few_row_groups_while_batch_mixes_many() -> None:
    p = BatchPlan(np.arange(100_000), np.arange(0, 100_000, 128), 256, 0, 4096, True)
    rows = p.epoch(0)[: p.steps_per_task]
    for rank in range(4):
        part = rows[:, rank * 64 : (rank + 1) * 64].ravel()
        assert len(np.unique(part // 128)) <= len(part) / 128 + 2 * p.lanes / 4
    assert len(np.unique(rows[0] // 128)) >= 2 * p.lanes - 4


@given(sizes, st.booleans(), st.integers(0, 40))
def test_part_of_an_epoch_leaves_out_the_images_of_its_other_steps(
    size: tuple[int, int], windowed: bool, steps: int
) -> None:
    p = plan(*size, windowed=windowed)
    assert sorted([*p.epoch(1)[:steps].ravel(), *p.tail(1, steps)]) == p.ids.tolist()
    assert p.tail(1, p.steps).tolist() == p.tail(1).tolist()


def test_tail_differs_between_epochs() -> None:
    p = plan(n=1000, batch=64)
    assert len({tuple(p.tail(e)) for e in range(5)}) > 1


def mixed(labelled: int, rest: int, r: int, t: int, windowed: bool = False) -> SemiSupervisedPlan:
    """Labelled ids are the multiples of 3 up to 3 * labelled; r of t in a batch."""
    few = 3 * np.arange(labelled)
    others = np.setdiff1d(np.arange(10_000), few)[:rest]
    starts = np.arange(0, 10_000, 50)
    return SemiSupervisedPlan(
        BatchPlan(few, starts, r, 0, 64, windowed), BatchPlan(others, starts, t - r, 0, 64, windowed)
    )


@given(st.integers(1, 30), st.integers(2, 200), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_every_batch_has_exactly_r_labelled_images(
    labelled: int, rest: int, r: int, others: int, windowed: bool
) -> None:
    r, others = min(r, labelled), min(others, rest)
    p = mixed(labelled, rest, r, r + others, windowed)
    seen_rest: list[int] = []
    seen_labelled: list[int] = []
    seen_pairs: set[tuple[int, int]] = set()
    for epoch in range(2):
        rows = p.epoch(epoch)
        assert rows.shape == (p.steps, r + others)
        is_labelled = np.isin(rows, p.labelled.ids)
        assert (is_labelled.sum(1) == r).all()
        assert all(len(set(row)) == len(row) for row in rows.tolist()), "an image twice in a batch"
        seen_rest = rows[~is_labelled].tolist()
        assert sorted([*seen_rest, *p.tail(epoch)]) == p.rest.ids.tolist()
        seen_labelled += rows[is_labelled].tolist()
        pairs = [*zip(rows.ravel().tolist(), p.passes(epoch).ravel().tolist(), strict=True)]
        assert not seen_pairs & set(pairs), "an image augmented twice in the same way"
        assert len(set(pairs)) == len(pairs)
        seen_pairs |= set(pairs)
    passes, used = p.labelled.steps * r, np.array(seen_labelled)
    for k in range(len(used) // passes):
        assert len(set(used[k * passes : (k + 1) * passes].tolist())) == passes, (
            "a labelled image twice before its turn"
        )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_labelled_images_are_shared_evenly_by_workers(world: int) -> None:
    p = mixed(40, 400, 12, 20)
    for step in range(p.steps):
        for rank in range(world):
            assert np.isin(p.slice(0, step, rank, world)[0], p.labelled.ids).sum() == 12 // world


def test_semi_supervised_plans_are_equal_by_their_parts() -> None:
    assert mixed(40, 400, 12, 20) == mixed(40, 400, 12, 20)
    assert len({mixed(40, 400, 12, 20), mixed(40, 400, 11, 20), mixed(39, 400, 12, 20), mixed(40, 399, 12, 20)}) == 4

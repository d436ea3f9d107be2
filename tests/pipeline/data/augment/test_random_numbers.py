"""The numbers equal those of `tasks.counter_rng`, and look random across images, passes, views, ops and seeds."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from firstlight.pipeline.data.augment.random_numbers import (
    FIRST_VIEW_STREAM,
    NUMBERS_PER_OP,
    CounterRng,
    derive_view_keys,
    draw_levels,
)
from firstlight.tasks import counter_rng

IDS = np.arange(20_000)


def numbers(
    seed: int = 0, epoch: int = 0, view: int = 0, op: int = 0, ids: np.ndarray = IDS, count: int = 8
) -> np.ndarray:
    return CounterRng(derive_view_keys(seed, np.full_like(ids, epoch), ids, view), op).uniform(count)


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
    st.integers(0, 9),
)
def test_numbers_equal_those_of_counter_rng_in_tasks(seed: int, epoch: int, ids: list[int], view: int) -> None:
    theirs = counter_rng.derive_keys(seed, epoch, torch.tensor(ids), FIRST_VIEW_STREAM + view)
    ours = derive_view_keys(seed, np.full(len(ids), epoch), np.array(ids), view)
    assert ours.view(np.int64).tolist() == theirs.tolist()
    for op in (0, 3):
        expected = (
            counter_rng.draw_uniform(theirs, NUMBERS_PER_OP * (op + 1))[:, NUMBERS_PER_OP * op :].double().numpy()
        )
        assert np.array_equal(np.floor(CounterRng(ours, op).uniform(NUMBERS_PER_OP) * 2**24) / 2**24, expected)


@given(st.lists(st.integers(0, 2**53 - 1), min_size=1, max_size=5))
def test_levels_of_noise_are_numbers_of_counter_rng_in_tasks(keys: list[int]) -> None:
    found = draw_levels(np.array(keys, np.uint64), 300)
    assert found.dtype == np.uint8
    assert np.array_equal(found, (256 * counter_rng.draw_uniform(torch.tensor(keys), 300)).byte().numpy())


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(0, 3))
def test_numbers_of_an_image_do_not_depend_on_its_batch(ids: list[int], op: int) -> None:
    together = numbers(7, 3, 1, op, np.array(ids))
    assert np.array_equal(together, np.concatenate([numbers(7, 3, 1, op, np.array([i])) for i in ids]))
    assert np.array_equal(together[:, :3], numbers(7, 3, 1, op, np.array(ids), count=3))


def test_each_number_is_uniform_over_consecutive_ids() -> None:
    drawn = numbers()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert min(stats.kstest(column, "uniform").pvalue for column in drawn.T) > 1e-3


OTHERS = {
    "epoch": {"epoch": 1},
    "view": {"view": 1},
    "op": {"op": 1},
    "seed": {"seed": 1},
    "far epoch": {"epoch": 2**30},
}


@pytest.mark.parametrize("name", [*OTHERS, "id"])
def test_numbers_of_neighbouring_ids_are_uncorrelated(name: str) -> None:
    """Also with the numbers beside them: no number is another's, shifted."""
    changes: dict[str, Any] = {"ids": IDS + 1} if name == "id" else OTHERS[name]
    first, second = numbers(), numbers(**changes)
    both = np.corrcoef(first.T, second.T)[:8, 8:]
    assert np.abs(both).max() < 5 / math.sqrt(len(IDS))
    shared = second[:-1] if name == "id" else second[:0]  # the same images in both
    assert np.isin(first, second).sum() == shared.size


def test_pairs_of_numbers_and_of_neighbouring_ids_fill_the_square() -> None:
    drawn = numbers(seed=1, count=3)
    pairs = [drawn[:, pair] for pair in itertools.combinations(range(3), 2)]
    pairs += [
        np.stack((drawn[:-1:2, 0], drawn[1::2, 0]), 1),
        np.stack((drawn[:, 0], numbers(seed=1, epoch=1)[:, 0]), 1),
    ]
    for pair in pairs:
        cells = np.bincount((pair * 16).astype(int) @ (16, 1), minlength=256)
        assert stats.chisquare(cells).pvalue > 1e-3


def test_consecutive_ids_show_no_period() -> None:
    """The spectrum of uniform noise is flat: its peaks are those of an exponential distribution."""
    power = np.abs(np.fft.rfft(numbers()[:, 0] - 0.5)[1:-1]) ** 2 / (len(IDS) / 12)
    assert stats.kstest(power, "expon").pvalue > 1e-3
    assert power.max() < math.log(len(power)) + 10


def test_keys_are_distinct_from_each_other_and_from_keys_of_methods() -> None:
    """Seed, pass, image and view are not exchangeable, even for small numbers. Methods use the streams 0, 1, ..."""
    grid = list(itertools.product(range(6), range(6), range(6)))
    ours = [
        derive_view_keys(seed, np.full(100, epoch), np.arange(100), view).view(np.int64) for seed, epoch, view in grid
    ]
    theirs = [counter_rng.derive_keys(seed, epoch, torch.arange(100), stream).numpy() for seed, epoch, stream in grid]
    assert len(np.unique(np.concatenate(ours + theirs))) == 2 * 6 * 6 * 6 * 100

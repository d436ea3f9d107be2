"""Sets of ids: the same answers as a sorted array, with a bit for each id at most."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.data.order.id_set import IdBits, IdRuns, IdSet, make_id_set

sorted_ids = st.sets(st.integers(0, 3000), min_size=1, max_size=400).map(lambda found: np.array(sorted(found)))


def list_forms(ids: np.ndarray) -> list[IdSet]:
    """The two forms of a set."""
    from firstlight.pipeline.data.order import id_set as module

    breaks = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    return [IdRuns(ids[breaks], np.concatenate([breaks, [len(ids)]])), module._make_bits(ids)]


@given(sorted_ids)
def test_both_forms_answer_as_the_sorted_array(ids: np.ndarray) -> None:
    numbers = np.arange(-2, 3100)
    for form in [*list_forms(ids), make_id_set(ids)]:
        assert len(form) == len(ids)
        assert form.list_ids().tolist() == ids.tolist()
        assert form.select_ids(np.arange(len(ids))[::-1]).tolist() == ids[::-1].tolist()
        assert form.count_smaller(numbers).tolist() == np.searchsorted(ids, numbers).tolist()
        expected = np.where(np.isin(numbers, ids), np.searchsorted(ids, numbers), -1)
        assert form.find_positions(numbers).tolist() == expected.tolist()
        assert len(form.select_ids(np.empty(0, np.int64))) == 0


@given(sorted_ids, sorted_ids)
def test_hash_is_that_of_the_ids(one: np.ndarray, two: np.ndarray) -> None:
    for first, second in zip(list_forms(one), list_forms(two), strict=True):
        assert (first.hash_ids() == second.hash_ids()) == np.array_equal(one, two)


@pytest.mark.parametrize("first", [0, 5_000_000_000])
def test_ids_in_a_row_take_nothing_and_others_a_bit(first: int) -> None:
    count = 5_000_000
    whole = make_id_set(np.arange(first, first + count))
    assert isinstance(whole, IdRuns)
    assert whole.nbytes < 100
    ids = first + np.flatnonzero(np.random.default_rng(0).random(count) < 0.9)
    thinned = make_id_set(ids)
    assert isinstance(thinned, IdBits)
    assert thinned.nbytes < 0.15 * count
    assert np.array_equal(thinned.list_ids(), ids)
    places = np.array([0, 1, 4_194_303, 4_194_304, len(ids) - 1])
    assert np.array_equal(thinned.select_ids(places), ids[places])

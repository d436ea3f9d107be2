"""The pairs of computations whose times are compared."""

import pytest
import torch
from torch.profiler import profile

from bench import losses


def test_fastest_repetition_counts_without_the_first() -> None:
    calls: list[int] = []
    seconds = losses.measure_cpu_seconds(lambda: calls.append(sum(range(2_000_000 if not calls else 10))), 3)
    assert len(calls) == 4
    assert seconds < 0.02


def test_random_rows_have_unit_length() -> None:
    torch.testing.assert_close(losses.random_unit_rows(5, 7).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("make_pairs", [losses.locality_pairs, losses.contrast_pairs, losses.corruption_pairs])
def test_both_sides_of_a_pair_run(make_pairs: object) -> None:
    torch.manual_seed(0)
    ((name, *sides),) = make_pairs()  # type: ignore[operator]
    assert " / " in name
    for side in sides:
        with profile() as done:
            side()
        assert done.events(), "nothing was computed"


def test_relations_by_gram_matrix_equal_vectors() -> None:
    torch.manual_seed(0)
    ((_, ours, other),) = losses.relation_pairs(500)
    torch.testing.assert_close(ours(), other(), atol=1e-5, rtol=1e-4)

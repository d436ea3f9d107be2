import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from firstlight.tasks.downstream.retrieval import mean_average_precision, precision_at, remove_query


def test_query_is_removed_or_else_the_last_id() -> None:
    found = torch.tensor([[7, 3, 9], [1, 2, 3], [4, 5, 8]])
    assert remove_query(found, torch.tensor([3, 0, 8])).tolist() == [[7, 9], [1, 2], [4, 5]]


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
def test_precision_is_the_share_of_right_ones(queries: int, k: int, seed: int) -> None:
    right = torch.rand(queries, 9, generator=torch.Generator().manual_seed(seed)) < 0.4
    expected = np.mean([sum(row[:k]) / k for row in right.tolist()])
    assert precision_at(right, [k])[k] == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_map_over_the_whole_gallery_equals_scikit_learns(queries: int, size: int, seed: int) -> None:
    right = torch.rand(queries, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    ranks = -np.arange(size)
    expected = np.mean([average_precision_score(row, ranks) if any(row) else 0.0 for row in right.tolist()])
    assert mean_average_precision(right, right.sum(1)) == pytest.approx(expected)


def test_best_possible_map_at_k_is_1() -> None:
    right = torch.tensor([[True, True, True], [True, False, False]])
    assert mean_average_precision(right, torch.tensor([50, 1])) == pytest.approx(1.0)
    assert mean_average_precision(right, torch.tensor([50, 2])) == pytest.approx((1 + 1 / 2) / 2)


def test_query_without_relevant_images_scores_0() -> None:
    assert mean_average_precision(torch.zeros(1, 4, dtype=torch.bool), torch.tensor([0])) == 0.0

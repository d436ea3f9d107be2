"""Moments of a softmax: those of parts add up to those of the whole, and to the formulas written out."""

import pytest
import torch
from torch import Tensor

from firstlight.tasks.softmax_moments import Moments

NUM_QUERIES, NUM_ROWS, DIM = 5, 12, 3


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, ROWS = draw(NUM_QUERIES, NUM_ROWS, scale=6.0), draw(NUM_ROWS, DIM, seed=1)


def measure(logits: Tensor, rows: Tensor) -> Moments:
    return Moments.from_logits(logits.clone(), rows)


def assert_close(found: Moments, expected: Moments) -> None:
    for name in ("log_partition", "entropy", "mean_row", "logit_covariance"):
        torch.testing.assert_close(getattr(found, name)(), getattr(expected, name)(), rtol=1e-10, atol=1e-10)


def test_moments_equal_their_formulas() -> None:
    found, weights = measure(LOGITS, ROWS), LOGITS.softmax(1)
    torch.testing.assert_close(found.log_partition(), LOGITS.logsumexp(1))
    torch.testing.assert_close(found.entropy(), -(weights * LOGITS.log_softmax(1)).sum(1))
    torch.testing.assert_close(found.mean_row(), weights @ ROWS)
    mean_logit = (weights * LOGITS).sum(1, keepdim=True)
    torch.testing.assert_close(found.logit_covariance(), (weights * LOGITS) @ ROWS - mean_logit * (weights @ ROWS))


@pytest.mark.parametrize("at", [1, 5, 11])
def test_moments_of_parts_add_up_in_any_order(at: int) -> None:
    first, second = measure(LOGITS[:, :at], ROWS[:at]), measure(LOGITS[:, at:], ROWS[at:])
    for one, other in ((first, second), (second, first)):
        assert_close(one.add_moments(other), measure(LOGITS, ROWS))


def test_moments_without_rows_change_nothing() -> None:
    found = measure(LOGITS, ROWS)
    assert_close(Moments.without_rows(LOGITS, DIM).add_moments(found), found)


def test_one_row_for_each_query_counts_as_a_logit_more() -> None:
    own, logit = draw(NUM_QUERIES, DIM, seed=2), draw(NUM_QUERIES, 1, seed=3)
    found = measure(LOGITS, ROWS).add_moments(Moments.from_row(logit, own))
    weights = torch.cat((LOGITS, logit), 1).softmax(1)
    torch.testing.assert_close(found.mean_row(), weights[:, :-1] @ ROWS + weights[:, -1:] * own)


def test_scaled_weights_change_the_partition_and_not_the_mean() -> None:
    once, twice = measure(LOGITS, ROWS), measure(LOGITS, ROWS).scale_weights(2.0)
    torch.testing.assert_close(twice.log_partition(), once.log_partition() + torch.log(torch.tensor(2.0)))
    torch.testing.assert_close(twice.mean_row(), once.mean_row())


def test_logits_far_apart_stay_finite() -> None:
    far = torch.tensor([[0.0, 1000.0], [-1000.0, 3.0]], dtype=torch.float64)
    found = measure(far[:, :1], ROWS[:1]).add_moments(measure(far[:, 1:], ROWS[1:2]))
    torch.testing.assert_close(found.log_partition(), torch.tensor([1000.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(found.mean_row(), ROWS[1].expand(2, DIM))

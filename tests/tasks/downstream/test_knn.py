import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tasks.downstream import knn
from tasks.downstream.knn import weighted_knn
from tests import references


def random(m: int, n: int, d: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    queries, bank = (torch.randn(size, d, generator=rng, dtype=torch.float64) for size in (m, n))
    return queries, bank, torch.randint(classes, (n,), generator=rng)


@given(st.integers(1, 25), st.integers(2, 6), st.integers(1, 40), st.sampled_from([0.05, 0.1, 1.0]), st.integers(0, 1000))
def test_it_is_the_papers(n: int, d: int, k: int, temperature: float, seed: int) -> None:
    """k larger than the bank included: then all of it votes."""
    queries, bank, labels = random(5, n, d, 3, seed)
    expected = [references.weighted_knn(q, bank.tolist(), labels.tolist(), k, temperature) for q in queries.tolist()]
    assert weighted_knn(queries, bank, labels, k, temperature).tolist() == expected


def test_one_neighbour_is_the_nearest() -> None:
    queries, bank, labels = random(20, 30, 4, 5)
    nearest = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2).argmax(1)
    assert torch.equal(weighted_knn(queries, bank, labels, 1, 0.1), labels[nearest])


def test_near_neighbours_outvote_many_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.01], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([2, 1, 1, 1])
    assert weighted_knn(torch.tensor([[1.0, 0.0]]), bank, labels, 4, 0.1).tolist() == [2]
    assert weighted_knn(torch.tensor([[1.0, 0.0]]), bank, labels, 4, 10.0).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-2, 1e-3, 1e-6, 1e-12, 1e-30])
def test_a_tiny_temperature_leaves_the_nearest(temperature: float) -> None:
    """In float32, where exp(similarity / temperature) overflows and exp((similarity - 1) / temperature) is zero for all classes."""
    queries, bank, labels = random(40, 60, 8, 7)
    queries, bank = queries.float(), bank.float()
    assert torch.equal(weighted_knn(queries, bank, labels, 5, temperature), weighted_knn(queries, bank, labels, 1, 1.0))
    assert torch.equal(weighted_knn(bank, bank, labels, 5, temperature), labels), "each image is its own neighbour"


def test_lengths_do_not_matter() -> None:
    queries, bank, labels = random(30, 50, 6, 4)
    scaled = bank * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    assert torch.equal(weighted_knn(queries * 1e4, scaled, labels, 7, 0.1), weighted_knn(queries, bank, labels, 7, 0.1))


def test_blocks_of_queries_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank, labels = random(knn.BLOCK + 37, 40, 5, 4)
    whole = weighted_knn(queries, bank, labels, 7, 0.1)
    assert len(whole) == knn.BLOCK + 37
    assert len(whole.unique()) > 1
    monkeypatch.setattr(knn, "BLOCK", 1)
    assert torch.equal(weighted_knn(queries, bank, labels, 7, 0.1), whole)


def test_a_zero_feature_is_finite() -> None:
    _, bank, labels = random(1, 10, 4, 3)
    bank[3] = 0
    assert 0 <= int(weighted_knn(torch.zeros(1, 4).double(), bank, labels, 10, 0.1)) < 3

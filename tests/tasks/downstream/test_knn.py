import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from firstlight.tasks.downstream import knn
from firstlight.tasks.downstream.knn import class_scores, is_label_in_top, nearest_neighbours, weighted_knn
from tests.support import references


def random(m: int, n: int, d: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    queries, bank = (torch.randn(size, d, generator=rng, dtype=torch.float64) for size in (m, n))
    return queries, bank, torch.randint(classes, (n,), generator=rng)


@given(
    st.integers(1, 25), st.integers(2, 6), st.integers(1, 40), st.sampled_from([0.05, 0.1, 1.0]), st.integers(0, 1000)
)
def test_prediction_is_the_papers_formula(n: int, d: int, k: int, temperature: float, seed: int) -> None:
    """If k is larger than the bank, all its images vote."""
    queries, bank, labels = random(5, n, d, 3, seed)
    expected = [references.weighted_knn(q, bank.tolist(), labels.tolist(), k, temperature) for q in queries.tolist()]
    assert weighted_knn(queries, bank, labels, k, temperature).tolist() == expected


def test_scores_by_products_are_the_papers_formula_over_a_bank() -> None:
    """Rows of a memory bank that were never written have other lengths than 1, and are not normalised."""
    queries, bank, labels = random(30, 25, 4, 3)
    scores = class_scores(queries, bank, labels, k=7, temperature=0.5, classes=3, similarity="product")
    found, by_cosine = (
        [references.weighted_knn(q, bank.tolist(), labels.tolist(), 7, 0.5, cosine) for q in queries.tolist()]
        for cosine in (False, True)
    )
    assert scores.argmax(1).tolist() == found != by_cosine


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
def test_tiny_temperature_selects_the_nearest(temperature: float) -> None:
    """In float32 exp(similarity / temperature) overflows, and exp((similarity - 1) / temperature) is 0 everywhere."""
    queries, bank, labels = random(40, 60, 8, 7)
    queries, bank = queries.float(), bank.float()
    assert torch.equal(weighted_knn(queries, bank, labels, 5, temperature), weighted_knn(queries, bank, labels, 1, 1.0))
    assert torch.equal(weighted_knn(bank, bank, labels, 5, temperature), labels), "each image is its own neighbour"


def test_scores_do_not_depend_on_the_length_of_features() -> None:
    queries, bank, labels = random(30, 50, 6, 4)
    scaled = bank * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    assert torch.equal(weighted_knn(queries * 1e4, scaled, labels, 7, 0.1), weighted_knn(queries, bank, labels, 7, 0.1))


def test_blocks_of_queries_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank, labels = random(knn.KNN_QUERY_BLOCK + 37, 40, 5, 4)
    whole = weighted_knn(queries, bank, labels, 7, 0.1)
    assert len(whole) == knn.KNN_QUERY_BLOCK + 37
    assert len(whole.unique()) > 1
    monkeypatch.setattr(knn, "KNN_QUERY_BLOCK", 1)
    assert torch.equal(weighted_knn(queries, bank, labels, 7, 0.1), whole)


@pytest.mark.fault(38, "a feature of zeros in kNN")
def test_zero_feature_has_finite_scores() -> None:
    _, bank, labels = random(1, 10, 4, 3)
    bank[3] = 0
    assert 0 <= int(weighted_knn(torch.zeros(1, 4).double(), bank, labels, 10, 0.1)) < 3


@given(st.integers(1, 30), st.integers(1, 35), st.integers(1, 11), st.integers(0, 1000))
def test_blocks_of_the_bank_equal_the_whole_and_ties_go_to_the_lowest_place(
    n: int, k: int, bank_block: int, seed: int
) -> None:
    """The vectors have few directions: most similarities are tied, also across blocks and on both sides of the k-th."""
    rng = torch.Generator().manual_seed(seed)
    bank, queries = (torch.eye(3)[torch.randint(3, (size,), generator=rng)] for size in (n, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "KNN_BANK_BLOCK", bank_block)
        similarity, places = nearest_neighbours(queries, bank, k)
    whole = queries @ bank.T
    for row, found, cosines in zip(whole.tolist(), places.tolist(), similarity.tolist(), strict=True):
        expected = sorted(range(n), key=lambda i: (-row[i], i))[:k]
        assert found == expected
        assert cosines == [row[i] for i in expected]


@given(st.integers(2, 40), st.integers(1, 20), st.integers(0, 1000))
def test_scores_equal_scikit_learns(n: int, k: int, seed: int) -> None:
    """scikit-learn's kNN classifier takes the Euclidean distance of unit vectors: cosine = 1 - distance^2 / 2."""
    queries, bank, labels = random(7, n, 6, 4, seed)
    unit_q, unit_b = (torch.nn.functional.normalize(x, dim=1).numpy() for x in (queries, bank))
    weigh = lambda distances: np.exp((1 - distances**2 / 2) / 0.1)  # noqa: E731
    other = KNeighborsClassifier(min(k, n), weights=weigh, algorithm="brute").fit(unit_b, labels.numpy())
    scores = class_scores(queries, bank, labels, k=k, temperature=0.1, classes=4)
    shares = scores.masked_fill(scores == -torch.inf, 0.0)
    shares = shares / shares.sum(1, keepdim=True)
    np.testing.assert_allclose(shares.numpy()[:, other.classes_], other.predict_proba(unit_q), atol=1e-6)


@given(st.integers(6, 9), st.integers(1, 5), st.integers(0, 1000))
def test_label_in_top_equals_scikit_learns_top_k_accuracy(classes: int, top: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(30, classes, generator=rng), torch.randint(classes, (30,), generator=rng)
    expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=top, labels=range(classes))
    assert float(is_label_in_top(scores, labels, top).double().mean()) == pytest.approx(expected)


def test_class_of_no_neighbour_is_no_hit() -> None:
    bank, labels = torch.eye(4), torch.arange(4)
    scores = class_scores(torch.eye(4), bank, labels, k=1, temperature=0.1, classes=6)
    assert is_label_in_top(scores, torch.tensor([0, 1, 2, 3]), 5).all()
    assert not is_label_in_top(scores, torch.tensor([1, 2, 3, 5]), 5).any()

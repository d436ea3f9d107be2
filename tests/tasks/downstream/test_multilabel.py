import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from firstlight.tasks.downstream.multilabel import MultilabelClassification, label_average_precisions
from tests.support.batches import present_batch
from tests.support.gloo import Pool
from tests.support.learners import build_encoder, build_task
from tests.support.references import multilabel_loss
from tests.support.two_workers import assert_workers_equal_one


def task(classes: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> MultilabelClassification:
    encoder = build_encoder({"norm": "group"}, 8)
    return build_task(MultilabelClassification, encoder, classes, dtype, norm="group", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_binary_cross_entropy_over_what_is_known(smoothing: float, reduction: str) -> None:
    b = present_batch(dtype=torch.float64)
    learner = task(dtype=torch.float64, label_smoothing=smoothing, reduction=reduction)
    logits = learner.compute_logits(b.views[0]).detach()
    expected = multilabel_loss(logits, b.targets["present"], smoothing, reduction)
    assert float(learner(b)["loss"].detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_the_loss_is_that_of_finite_differences(reduction: str) -> None:
    b, learner = present_batch(dtype=torch.float64), task(dtype=torch.float64, reduction=reduction)
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: learner.loss((x,), b)["loss"], logits)


def test_sum_has_the_mean_times_the_known_labels_of_an_image() -> None:
    """About 20 with the 20 classes of VOC, a few of which are unknown: so much larger are the steps of the protocol."""
    rng = torch.Generator().manual_seed(0)
    present = torch.randint(0, 2, (32, 20), generator=rng, dtype=torch.int8)
    present[0, :2] = -1
    logits = torch.randn(32, 20, generator=rng, dtype=torch.float64, requires_grad=True)
    b = present_batch(32, classes=20)
    b.targets["present"].copy_(present)
    grown = [
        torch.autograd.grad(task(20, reduction=reduction).loss((logits,), b)["loss"], logits)[0]
        for reduction in ("sum", "mean")
    ]
    torch.testing.assert_close(grown[0], grown[1] * (638 / 32), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_workers_equal_one(pool: Pool, reduction: str) -> None:
    build = partial(task, dtype=torch.float64, reduction=reduction)
    one = assert_workers_equal_one(pool, build, present_batch(dtype=torch.float64))
    assert one.gradients


def test_image_without_known_labels_has_loss_0() -> None:
    b = present_batch()
    b.targets["present"][:] = -1
    learner = task()
    losses = learner(b)
    losses["loss"].backward()
    assert float(losses["loss"].detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in learner.parameters())


def naive_eleven_point(scores: np.ndarray, truth: np.ndarray) -> float:
    """VOC 2007, as its development kit writes it, for distinct scores."""
    hits = np.cumsum(truth[np.argsort(-scores)])
    recall, precision = hits / truth.sum(), hits / np.arange(1, len(hits) + 1)
    return float(np.mean([max(precision[recall >= t - 1e-12], default=0.0) for t in np.linspace(0, 1, 11)]))


def test_average_precision_equals_scikit_learns_and_vocs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores, truth = rng.normal(size=40), rng.integers(-1, 2, 40)
        exact, eleven = label_average_precisions(torch.from_numpy(scores), torch.from_numpy(truth))
        known = truth >= 0
        assert exact == pytest.approx(average_precision_score(truth[known], scores[known]))
        assert eleven == pytest.approx(naive_eleven_point(scores[known], truth[known]))


def test_perfect_ranking_has_precision_1_and_worst_ranking_the_least() -> None:
    truth = torch.tensor([1, 1, 0, 0, -1])
    assert label_average_precisions(torch.tensor([4.0, 3, 2, 1, 9]), truth) == pytest.approx((1.0, 1.0))
    exact, eleven = label_average_precisions(torch.tensor([1.0, 2, 3, 4, 9]), truth)
    assert exact == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert eleven == pytest.approx(0.5)


def test_classes_without_positives_are_not_in_the_mean() -> None:
    learner = task(classes=2)
    logits, present = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1, 0], [0, -1]])
    scores = learner.score((logits, present))
    assert scores["map"] == scores["map_11point"] == 1.0
    per_class = scores["ap"]
    assert isinstance(per_class, list)
    assert per_class[0] == 1.0
    assert math.isnan(per_class[1])


@pytest.mark.parametrize("column", [[1, 1, 1], [0, 0, 0], [1, 1, -1], [-1, -1, -1]])
def test_class_of_all_images_or_of_none_has_no_score(column: list[int]) -> None:
    """Any order of the images would be perfect, or none can be right."""
    assert all(map(math.isnan, label_average_precisions(torch.tensor([0.1, 0.2, 0.3]), torch.tensor(column))))
    scores = task(classes=2).score((torch.rand(3, 2), torch.tensor([column, column]).T))
    assert math.isnan(scores["map"])  # type: ignore[arg-type]


def test_training_raises_the_map() -> None:
    learner, b = task(), present_batch()
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    before = learner.eval().score(learner.observe(b))["map"]
    for _ in range(60):
        optimizer.zero_grad()
        learner.train()(b)["loss"].backward()
        optimizer.step()
    after = learner.eval().score(learner.observe(b))["map"]
    assert isinstance(after, float)
    assert isinstance(before, float)
    assert after > max(before, 0.95)

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
from tests.support.two_workers import assert_workers_equal_one


def task(classes: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> MultilabelClassification:
    encoder = build_encoder({"norm": "group"}, 8)
    return build_task(MultilabelClassification, encoder, classes, dtype, norm="group", **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_binary_cross_entropy_over_what_is_known(smoothing: float) -> None:
    learner, b = task(label_smoothing=smoothing), present_batch()
    logits = learner.compute_logits(b.views[0]).detach().double()
    total, count = 0.0, 0
    for i in range(12):
        for c in range(4):
            if (y := int(b.targets["present"][i, c])) >= 0:
                p = 1 / (1 + math.exp(-float(logits[i, c])))
                wanted = (1 - smoothing) * y + smoothing / 2
                total -= wanted * math.log(p) + (1 - wanted) * math.log(1 - p)
                count += 1
    assert float(learner(b)["loss"].detach()) == pytest.approx(total / count, rel=1e-5)


def test_two_workers_equal_one(pool: Pool) -> None:
    one = assert_workers_equal_one(pool, partial(task, dtype=torch.float64), present_batch(dtype=torch.float64))
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

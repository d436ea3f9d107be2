import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from firstlight.tasks.downstream.multilabel import Multilabel, average_precisions
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from tests.support.gloo import Pool


def task(classes: int = 4, **options: object) -> Multilabel:
    torch.manual_seed(0)
    return Multilabel(
        Encoder({"name": "convnet", "norm": "group", "width": 4, "depth": 2}, 8), classes, norm="group", **options
    )  # type: ignore[arg-type]


def batch(n: int = 12, classes: int = 4) -> Batch:
    rng = torch.Generator().manual_seed(3)
    present = torch.randint(-1, 2, (n, classes), generator=rng, dtype=torch.int8)
    unknown = torch.full((n,), -1)
    return Batch(
        torch.arange(n),
        torch.arange(n),
        unknown,
        (torch.rand(n, 3, 8, 8, generator=rng),),
        torch.zeros(n, dtype=torch.int64),
        {"present": present},
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_binary_cross_entropy_over_what_is_known(smoothing: float) -> None:
    learner, b = task(label_smoothing=smoothing), batch()
    logits = learner.logits(b.views[0]).detach().double()
    total, count = 0.0, 0
    for i in range(12):
        for c in range(4):
            if (y := int(b.targets["present"][i, c])) >= 0:
                p = 1 / (1 + math.exp(-float(logits[i, c])))
                wanted = (1 - smoothing) * y + smoothing / 2
                total -= wanted * math.log(p) + (1 - wanted) * math.log(1 - p)
                count += 1
    assert float(learner(b)["loss"].detach()) == pytest.approx(total / count, rel=1e-5)


def _half(rank_: int, world_: int) -> list[torch.Tensor]:
    import torch.distributed as dist

    learner, size = task().double(), 12 // world_
    b = batch()
    part = Batch(b.ids, b.rows, b.labels, (b.views[0].double(),), b.passes, b.targets).part(
        rank_ * size, (rank_ + 1) * size
    )
    learner(part)["loss"].backward()
    grads = [p.grad for p in learner.parameters() if p.grad is not None]
    for grad in grads:
        if world_ > 1:
            dist.all_reduce(grad)
            grad /= world_
    return grads


def _on_rank() -> list[torch.Tensor]:
    import torch.distributed as dist

    return _half(dist.get_rank(), dist.get_world_size())


def test_two_workers_have_the_gradient_of_one(pool: Pool) -> None:
    alone = _half(0, 1)
    for grads in pool.run(_on_rank):
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(alone, grads, strict=True))


def test_an_image_of_which_nothing_is_known_costs_nothing() -> None:
    b = batch()
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


def test_average_precision_is_scikit_learns_and_voc_s() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores, truth = rng.normal(size=40), rng.integers(-1, 2, 40)
        exact, eleven = average_precisions(torch.from_numpy(scores), torch.from_numpy(truth))
        known = truth >= 0
        assert exact == pytest.approx(average_precision_score(truth[known], scores[known]))
        assert eleven == pytest.approx(naive_eleven_point(scores[known], truth[known]))


def test_a_perfect_and_a_hopeless_ranking() -> None:
    truth = torch.tensor([1, 1, 0, 0, -1])
    assert average_precisions(torch.tensor([4.0, 3, 2, 1, 9]), truth) == pytest.approx((1.0, 1.0))
    exact, eleven = average_precisions(torch.tensor([1.0, 2, 3, 4, 9]), truth)
    assert exact == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert eleven == pytest.approx(0.5)


def test_classes_that_nobody_shows_do_not_count() -> None:
    learner = task(classes=2)
    logits, present = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1, 0], [0, -1]])
    scores = learner.score((logits, present))
    assert scores["map"] == scores["map_11point"] == 1.0
    per_class = scores["ap"]
    assert isinstance(per_class, list)
    assert per_class[0] == 1.0
    assert math.isnan(per_class[1])


def test_it_learns_and_scores_itself() -> None:
    learner, b = task(), batch()
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

import numpy as np
import pytest
import torch

from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.classify_square import SquareLossClassification, label_square_loss
from firstlight.tasks.nn.encoders import Encoder
from tests.support import references
from tests.support.batches import labelled_batch


def task(**options: object) -> SquareLossClassification:
    torch.manual_seed(0)
    return SquareLossClassification(
        Encoder({"name": "convnet", "norm": "batch", "width": 4, "depth": 2}, 8), 5, **options
    )  # type: ignore[arg-type]


def outputs(n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=rng, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True), torch.randint(5, (n,), generator=rng)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_equation_2_and_sklearns(smoothing: float) -> None:
    from sklearn.metrics import mean_squared_error
    from sklearn.preprocessing import label_binarize

    x, labels = outputs()
    wanted = (1 - smoothing) * label_binarize(labels.numpy(), classes=range(5)) + smoothing / 5
    assert float(label_square_loss(x, labels, smoothing)) == pytest.approx(
        mean_squared_error(wanted, x.numpy()) * 5 / 2, rel=1e-12
    )
    assert float(label_square_loss(x, labels, smoothing)) == pytest.approx(
        references.nat_loss(x, torch.from_numpy(np.asarray(wanted))), rel=1e-12
    )


def test_square_loss_on_the_sphere_is_1_minus_cosine() -> None:
    x, labels = outputs()
    assert float(label_square_loss(x, labels)) == pytest.approx(
        float(np.mean([1 - float(x[i, y]) for i, y in enumerate(labels)])), rel=1e-12
    )


def test_outputs_are_on_the_unit_sphere_and_are_learned() -> None:
    learner, b = task(), labelled_batch()
    assert TASKS["classify_square"] is SquareLossClassification
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = learner.train()(b)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert torch.allclose(learner.compute_logits(b.views[0]).norm(dim=1), torch.ones(12))
    assert losses[-1] < 0.5 * losses[0]
    assert min(losses) >= 0
    with torch.no_grad():
        scores = learner.eval().score(learner.observe(b))
    assert isinstance(scores["accuracy"], float)
    assert scores["accuracy"] > 0.5


def test_the_heads_weights_can_be_gaussian() -> None:
    weights = [m.weight for m in task(init="gaussian", hidden=(400,)).head if isinstance(m, torch.nn.Linear)]
    assert len(weights) == 2
    assert all(float(w.detach().std()) == pytest.approx(0.01, rel=0.15) for w in weights)


def test_probabilities_are_the_outputs_above_zero_or_the_largest() -> None:
    found = task().compute_probabilities(torch.tensor([[0.6, -0.8, 0.2], [-0.5, -0.1, -0.9], [0.0, -0.6, -0.8]]))
    expected = torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected)

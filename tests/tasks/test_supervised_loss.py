import pytest
import torch

from firstlight.tasks.collective import rank
from firstlight.tasks.supervised_loss import labelled_cross_entropy
from tests.support import references
from tests.support.gloo import Pool

LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([2, -1, 0, 1, -1, -1, 1, -1])  # two workers hold 3 and 1 of them


def test_the_mean_is_over_the_labelled_images() -> None:
    loss, hits = labelled_cross_entropy(LOGITS, LABELS)
    assert float(loss) == pytest.approx(
        references.labelled_cross_entropy(LOGITS.softmax(1), LABELS.tolist()), rel=1e-12
    )
    assert float(hits) == pytest.approx(
        sum(int(row.argmax()) == int(y) for row, y in zip(LOGITS, LABELS, strict=True)) / 4
    )


def test_batch_without_labels_has_loss_0_and_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss, hits = labelled_cross_entropy(logits, torch.full((8,), -1))
    loss.backward()
    assert float(loss.detach()) == float(hits) == 0.0
    assert torch.equal(logits.grad, torch.zeros(8, 3))  # type: ignore[arg-type]


def test_half_precision_is_summed_in_single() -> None:
    assert labelled_cross_entropy(LOGITS.bfloat16(), LABELS)[0].dtype == torch.float32


def of_one_worker(labels: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    logits = LOGITS.view(2, 4, 3)[rank()].clone().requires_grad_()
    loss, hits = labelled_cross_entropy(logits, labels.view(2, 4)[rank()])
    loss.backward()
    return float(loss.detach()), float(hits), logits.grad  # type: ignore[return-value]


@pytest.mark.parametrize("second", [1, -1])
def test_workers_may_hold_different_numbers_or_none(pool: Pool, second: int) -> None:
    logits, labels = LOGITS.clone().requires_grad_(), LABELS.clone()
    labels[6] = second
    loss, hits = labelled_cross_entropy(logits, labels)
    loss.backward()
    answers = pool.run(of_one_worker, labels)
    assert sum(a[0] for a in answers) / 2 == pytest.approx(float(loss.detach()), rel=1e-12)
    assert sum(a[1] for a in answers) / 2 == pytest.approx(float(hits), rel=1e-12)
    torch.testing.assert_close(torch.cat([a[2] for a in answers]) / 2, logits.grad, rtol=1e-10, atol=1e-14)

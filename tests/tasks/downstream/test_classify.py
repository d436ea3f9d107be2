import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import BatchNorm
from tests.support.batches import labelled_batch


def task(norm: str = "batch", **options: object) -> Classification:
    torch.manual_seed(0)
    encoder = Encoder({"name": "convnet", "norm": norm, "width": 4, "depth": 2}, 8)
    return Classification(encoder, 5, **options)  # type: ignore[arg-type]


def steps(learner: Classification, count: int = 3) -> None:
    learner.train()
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        learner(labelled_batch())["loss"].backward()
        optimizer.step()
        learner.train()


def changed(learner: Classification) -> tuple[set[str], set[str]]:
    """Returns the names of the state that three steps change, and of the state that they do not change."""
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    steps(learner)
    different = {k for k, v in learner.state_dict().items() if not torch.equal(v, before[k])}
    return different, before.keys() - different


def test_train_head_leaves_the_encoder_and_its_batch_statistics() -> None:
    learner = task(train="head", hidden=(6,))
    different, same = changed(learner)
    assert same >= {k for k in learner.state_dict() if k.startswith("encoder.")}
    assert any(k.endswith("running_mean") for k in same)
    assert all(k.startswith("head.") for k in different)
    assert {k for k in learner.state_dict() if k.startswith("head.")} <= different
    assert all(p.grad is None for p in learner.encoder.parameters())


def test_train_head_trains_the_head_in_training_mode() -> None:
    learner = task(train="head", hidden=(6,), dropout=0.5).train()
    assert learner.training
    assert all(m.training for m in learner.head.modules())
    assert not any(m.training for m in learner.encoder.modules())
    assert not any(m.training for m in learner.eval().modules())


def test_train_all_changes_everything() -> None:
    learner = task(train="all", hidden=(6,))
    assert changed(learner)[1] == set()


def naive_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        log_sum = float(torch.tensor(row, dtype=torch.float64).exp().sum().log())
        for c, value in enumerate(row):
            total -= ((1 - smoothing) * (c == label) + smoothing / len(row)) * (value - log_sum)
    return total / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_cross_entropy_and_the_accuracy_the_share_of_hits(smoothing: float) -> None:
    learner, b = task(norm="group", label_smoothing=smoothing), labelled_batch()
    losses = learner(b)
    logits = learner.compute_logits(b.views[0]).detach()
    assert float(losses["loss"].detach()) == pytest.approx(naive_cross_entropy(logits, b.labels, smoothing), rel=1e-5)
    hits = sum(int(row.argmax()) == int(label) for row, label in zip(logits, b.labels, strict=True))
    assert float(losses["accuracy"]) == pytest.approx(hits / 12)


@pytest.mark.parametrize("pool", ["avg", "flatten"])
def test_prediction_is_the_largest_logit(pool: str) -> None:
    learner, b = task(pool=pool).eval(), labelled_batch()
    assert learner.compute_logits(b.views[0]).shape == (12, 5)
    assert torch.equal(learner.observe(b)[0], learner.compute_logits(b.views[0]).argmax(1))


def test_the_hidden_layers() -> None:
    linear, deep = task().head, task(hidden=(7, 6), dropout=0.25, norm="batch").head
    assert [type(m) for m in linear] == [nn.Linear]
    assert [type(m) for m in deep] == [
        nn.Linear,
        BatchNorm,
        nn.ReLU,
        nn.Dropout,
        nn.Linear,
        BatchNorm,
        nn.ReLU,
        nn.Linear,
    ]
    assert [(m.in_features, m.out_features) for m in deep if isinstance(m, nn.Linear)] == [(8, 7), (7, 6), (6, 5)]
    assert task(pool="flatten").head[0].in_features == 8 * 2 * 2


def test_head_as_in_alexnet_has_its_dropout_and_biases() -> None:
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2}, 8)
    head = Classification(
        encoder, 5, hidden=(7, 6), dropout=0.5, dropout_layers="all", norm="none", init="gaussian", bias=0.1
    ).head
    assert [type(m) for m in head] == [*[nn.Linear, nn.ReLU, nn.Dropout] * 2, nn.Linear]
    assert all(bool((m.bias == torch.tensor(0.1)).all()) for m in head if isinstance(m, nn.Linear))
    assert not task(init="gaussian").head[-1].bias.any()
    learner = task(hidden=(7,))
    assert learner.output_layers() == (learner.head[-1],)


def test_half_precision_features_give_float_logits() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert task(norm="group").compute_logits(labelled_batch().views[0]).dtype == torch.float32


def test_square_loss_is_learned() -> None:
    learner = task(norm="group")
    before = float(learner(labelled_batch())["loss"].detach())
    steps(learner, 20)
    assert float(learner(labelled_batch())["loss"].detach()) < before


def test_task_is_registered() -> None:
    assert TASKS["classify"] is Classification


def test_train_all_leaves_frozen_what_the_encoder_has_frozen() -> None:
    """No map depends on some parts of a library's network: DistributedDataParallel would wait for their gradients."""
    encoder = Encoder({"name": "convnet", "norm": "group", "width": 4, "depth": 2}, 8)
    first = next(encoder.parameters()).requires_grad_(False)
    learner = Classification(encoder, 5, train="all", norm="group")
    assert not first.requires_grad
    assert all(p.requires_grad for p in learner.parameters() if p is not first)

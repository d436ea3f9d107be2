from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.collective import rank
from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.downstream.detect import Detection
from firstlight.tasks.downstream.segment import Segmentation
from firstlight.tasks.downstream.starting_weights import (
    MAX_RESPONSE_IMAGES,
    check_rescaling,
    count_response_images,
    fold_encoder,
    rescale_task,
)
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.rescaling import RESPONSE_MEAN, measure_change_rates
from firstlight.tasks.nn.weight_init import WeightedLayer
from tests.support.batches import batch_of_images
from tests.support.gloo import Pool

ALEXNET: dict[str, Any] = {"hidden": (16, 12), "dropout": 0.5, "dropout_layers": "all", "norm": "none"}
HEAD: dict[str, Any] = {**ALEXNET, "pool": "flatten", "init": "gaussian", "bias": 0.1}


def folded_encoder(size: int = 16) -> Encoder:
    """A folded encoder whose batch normalisations had statistics, as after a training."""
    torch.manual_seed(0)
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2, "input": "sobel", "normalize": "image"}, size)
    encoder.train()(torch.rand(8, 3, size, size) ** 3)
    fold_encoder(encoder)
    return encoder


def classification(**options: Any) -> Classification:
    encoder = folded_encoder()
    torch.manual_seed(1)
    return Classification(encoder, 5, **{**HEAD, **options})


def images(count: int = 48) -> Batch:
    return batch_of_images(torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2)))


def rates(task: Task, batch: Batch) -> list[float]:
    return list(measure_change_rates(lambda: task.embed(batch), task, task.output_layers()).values())


def responses(task: Task, batch: Batch) -> dict[nn.Module, Tensor]:
    """The (channels, n) outputs of each layer."""
    found: dict[nn.Module, Tensor] = {}
    for layer in task.modules():
        if isinstance(layer, WeightedLayer):
            layer.register_forward_hook(
                lambda layer, _, out: found.update({layer: out.movedim(min(1, out.ndim - 1), 0).flatten(1)})
            )
    with torch.no_grad():
        task.eval().embed(batch)
    return found


@pytest.mark.parametrize("train", ["all", "head"])
def test_new_layers_are_normalised_and_a_pretrained_encoder_is_only_scaled(train: str) -> None:
    task, b = classification(train=train), images()
    before = task.encoder(b.views[0])[-1].detach()
    fixed = [tensor.clone() for tensor in task.head[-1].parameters()]
    rescale_task(task, b, new_layers_only=True)
    assert task.training
    found = rates(task.eval(), b.select_range(0, 16))
    assert len(found) == 4
    assert max(found) / min(found) < 1.01, "all layers change at the same rate"
    shares = task.encoder(b.views[0])[-1].detach() / before
    shares = shares[before > 1e-3]
    torch.testing.assert_close(shares, shares.mean().expand_as(shares), rtol=1e-3, atol=0)
    for layer, channels in responses(task, b).items():
        if layer in (task.head[0], task.head[3]):
            spreads = channels.std(1, correction=0)
            torch.testing.assert_close(spreads, spreads.mean().expand_as(spreads), rtol=1e-3, atol=0)
            torch.testing.assert_close(channels.mean(1), RESPONSE_MEAN * spreads, rtol=1e-2, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(fixed, task.head[-1].parameters(), strict=True))
    assert [p.requires_grad for p in task.encoder.parameters()] == [train == "all"] * 4


def test_all_layers_are_normalised_where_nothing_is_pretrained() -> None:
    task, b = classification(), images()
    rescale_task(task, b, new_layers_only=False)
    found = responses(task, b)
    hidden = [channels for layer, channels in found.items() if layer is not task.head[-1]]
    assert len(hidden) == 4
    for channels in hidden:
        spreads = channels.std(1, correction=0)
        torch.testing.assert_close(spreads, spreads.mean().expand_as(spreads), rtol=1e-3, atol=0)
        torch.testing.assert_close(channels.mean(1), RESPONSE_MEAN * spreads, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("proposals", ["windows", "network"])
def test_detector_is_balanced_from_the_encoder_to_its_box_head(proposals: Any) -> None:
    size, rng = 48, torch.Generator().manual_seed(0)
    encoder = folded_encoder(size)
    task = Detection(
        encoder, 2, anchors=(16, 32), hidden=16, sampled=16, proposals=proposals, dropout=0.5, init="gaussian"
    )
    boxes = torch.tensor([[[4.0, 4.0, 30.0, 30.0]]]).expand(6, 1, 4)
    targets = {
        "boxes": boxes,
        "box_classes": torch.zeros(6, 1, dtype=torch.long),
        "difficult": torch.zeros(6, 1, dtype=torch.bool),
    }
    b = batch_of_images(torch.rand(6, 3, size, size, generator=rng), targets)
    own = {name: tensor.clone() for name, tensor in task.detector.rpn.state_dict().items()}
    predictor = [p.clone() for p in task.detector.roi_heads.box_predictor.parameters()]
    rescale_task(task, b, new_layers_only=True)
    task.train()
    task.detector.roi_heads.box_head.eval()

    def run() -> None:
        torch.manual_seed(0)
        task.probe_outputs(b)

    found = list(measure_change_rates(run, task, task.output_layers()).values())
    assert len(found) == 4, "two convolutions, fc6 and fc7"
    assert max(found) / min(found) < 1.02
    assert all(torch.equal(own[name], tensor) for name, tensor in task.detector.rpn.state_dict().items())
    now = task.detector.roi_heads.box_predictor.parameters()
    assert all(torch.equal(a, b) for a, b in zip(predictor, now, strict=True))


def rescaled_state(new_layers_only: bool) -> tuple[int, dict[str, Tensor]]:
    task = classification()
    rescale_task(task, images(), new_layers_only=new_layers_only)
    return rank(), task.state_dict()


@pytest.mark.parametrize("new_layers_only", [True, False])
def test_every_worker_has_the_same_weights(pool: Pool, new_layers_only: bool) -> None:
    torch.manual_seed(99)
    _, here = rescaled_state(new_layers_only)
    answers: list[tuple[int, dict[str, Tensor]]] = pool.run(partial(rescaled_state, new_layers_only))
    assert [worker for worker, _ in answers] == [0, 1]
    for _, there in answers:
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(answers[0][1][name], tensor) for name, tensor in answers[1][1].items())


def test_rescaling_draws_nothing_from_the_state_of_others() -> None:
    task = classification()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rescale_task(task, images(), new_layers_only=True)
    assert torch.equal(torch.rand(3), expected)


def test_task_whose_layers_are_normalised_says_that_scales_have_no_effect() -> None:
    check_rescaling(classification())
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2}, 16)
    for task, reason in (
        (Classification(encoder, 5, **HEAD), "2 normalisations undo every scale"),
        (classification(norm="batch"), "2 normalisations undo every scale; set batch_norm: fold, and task.norm: none"),
        (Segmentation(folded_encoder(), 3), "a task of this kind is never rescaled"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_rescaling(task)
        with pytest.raises(ValueError, match=reason):
            rescale_task(task, images(), new_layers_only=True)


def test_fewer_images_are_looked_at_where_they_are_large() -> None:
    assert count_response_images(32) == count_response_images(224) == MAX_RESPONSE_IMAGES
    assert count_response_images(800) == 5
    assert count_response_images(10_000) == 1

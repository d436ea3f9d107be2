"""The common parameters of downstream tasks: the trained layers, and their learning rates."""

import math

import pytest
import torch
from torch import nn

from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.nn.encoders import Encoder
from tests.support.batches import labelled_batch


def classify(**options: object) -> Classification:
    torch.manual_seed(0)
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 3}, 16)
    return Classification(encoder, 5, **options)  # type: ignore[arg-type]


def trained_stages(task: Classification) -> set[str]:
    return {
        name.split(".")[2] for name, p in task.named_parameters() if name.startswith("encoder.") and p.requires_grad
    }


@pytest.mark.parametrize(("train", "stages"), [("all", {"0", "1", "2"}), (1, {"1", "2"}), (2, {"2"}), ("head", set())])
def test_train_selects_the_trained_layers(train: object, stages: set[str]) -> None:
    assert trained_stages(classify(train=train)) == stages


def test_frozen_layers_keep_their_batch_statistics_and_others_do_not() -> None:
    task = classify(train=2)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task.train()
    task(labelled_batch(size=16))["loss"].backward()
    optimizer.step()
    changed = {
        k.removeprefix("encoder.stages.")[0]
        for k, v in task.state_dict().items()
        if not torch.equal(v, before[k]) and "stages" in k
    }
    assert changed == {"2"}


def test_task_on_a_shallow_map_trains_no_deeper_layer() -> None:
    task = classify(layer=1)
    assert trained_stages(task) == {"0", "1"}
    task(labelled_batch(size=16))["loss"].backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    assert task.head[0].in_features == 8
    assert classify(layer=-2).layer == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer: 3"),
        ({"layer": -4}, "layer: -4"),
        ({"train": 3}, "train: 3"),
        ({"train": 1, "layer": 0}, "train: 1"),
    ],
)
def test_wrong_parameters_raise_with_their_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classify(**options)


def test_layer_decay_slows_the_layers_from_the_head_down() -> None:
    task = classify(layer_decay=0.5)
    groups = task.parameter_groups()
    assert [factor for factor, _ in groups] == [1.0, 1.0, 0.5, 0.25]
    names = {id(p): name for name, p in task.named_parameters()}
    assert [{names[id(p)].split(".")[2 if "stages" in names[id(p)] else 0] for p in group} for _, group in groups] == [
        {"head"},
        {"2"},
        {"1"},
        {"0"},
    ]
    everything = [p for _, group in groups for p in group]
    assert len(everything) == len(set(everything)) == len([p for p in task.parameters() if p.requires_grad])


def test_layer_decay_leaves_out_what_is_frozen() -> None:
    assert [factor for factor, _ in classify(layer_decay=0.5, train=2).parameter_groups()] == [1.0, 1.0]
    assert [factor for factor, _ in classify(layer_decay=0.5, train="head").parameter_groups()] == [1.0]
    assert [factor for factor, _ in classify().parameter_groups()] == [1.0]


def test_logits_of_views_are_averaged_before_scoring() -> None:
    task, b = classify().eval(), labelled_batch(size=16, views=3)
    predicted, labels, place = task.observe(b)
    mean = sum(task.compute_logits(view) for view in b.views) / 3
    assert torch.equal(predicted, mean.argmax(1))
    for row in range(12):
        assert int(place[row]) == sum(float(x) > float(mean[row, labels[row]]) for x in mean[row])


def test_accuracy_and_top5() -> None:
    task = classify()
    task.classes = 9
    rows = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 0]), torch.tensor([0, 4, 0, 5])
    assert task.score(rows) == {"accuracy": 0.5, "top5": 0.75}


def test_task_without_a_decoder_refuses_one() -> None:
    with pytest.raises(ValueError, match="starts from the encoder only"):
        classify().start_from({"decoder": nn.Identity()})


def test_mean_without_nan_ignores_nan() -> None:
    from firstlight.tasks.downstream.multilabel import mean_without_nan

    assert mean_without_nan([math.nan, 1.0, 0.0]) == 0.5
    assert math.isnan(mean_without_nan([math.nan]))

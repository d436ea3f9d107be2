import json

import pytest
import torch
from torch import nn

from firstlight.tasks.nn.heads import Projection, build_mlp
from firstlight.tasks.nn.norms import BatchNorm


def test_perceptron_without_hidden_layers_is_linear() -> None:
    assert [type(layer) for layer in build_mlp(6, (), 3, dropout=0.5, norm="batch")] == [nn.Linear]


def test_dropout_follows_the_first_hidden_layer_only() -> None:
    layers = [type(layer) for layer in build_mlp(6, (5, 4), 3, dropout=0.5, norm="batch")]
    hidden = [nn.Linear, BatchNorm, nn.ReLU]
    assert layers == [*hidden, nn.Dropout, *hidden, nn.Linear]
    assert nn.Dropout not in [type(layer) for layer in build_mlp(6, (5, 4), 3, dropout=0.0, norm="batch")]


def test_head_of_alexnet_has_dropout_after_both_hidden_layers_and_no_normalisation() -> None:
    head = build_mlp(6, (5, 4), 3, dropout=0.5, norm="none", dropout_layers="all")
    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in head] == [*hidden, *hidden, nn.Linear]
    assert all(layer.bias is not None for layer in head if isinstance(layer, nn.Linear))
    (first,) = build_mlp(6, (5,), 3, dropout=0.0, norm="batch")[:1]
    assert first.bias is None


@pytest.mark.parametrize(("pool", "size"), [("avg", 8), ("flatten", 8 * 9)])
def test_projection_gives_unit_vectors_of_the_deepest_map(pool: str, size: int) -> None:
    head = Projection(size, (), 4, dropout=0.0, norm="batch", pool=pool)
    maps = [torch.randn(5, 2, 6, 6), torch.randn(5, 8, 3, 3)]
    vectors = head(maps)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    assert torch.equal(vectors, head([torch.zeros_like(maps[0]), maps[1]]))


def test_projection_of_half_precision_maps_is_in_single_precision() -> None:
    head = Projection(8, (), 4, dropout=0.0, norm="batch", pool="avg").to(torch.bfloat16)
    assert head([torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)]).dtype == torch.float32


def test_spec_survives_json_and_builds_the_same_network() -> None:
    head = Projection(8, (6,), 4, dropout=0.25, norm="group", pool="avg")
    other = Projection(**json.loads(json.dumps(head.spec)))
    other.load_state_dict(head.state_dict())
    assert other.spec == head.spec
    assert str(other) == str(head)

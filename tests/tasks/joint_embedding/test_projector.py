"""The projector's layers, its precision, and the pooling that it starts from."""

import pytest
import torch
from torch import nn

from firstlight.tasks.joint_embedding.projector import Projector, choose_pooling
from firstlight.tasks.nn.encoders import Encoder
from tests.support.learners import build_encoder


def list_layers(**options: object) -> list[tuple[str, tuple[int, ...]]]:
    projector = Projector(6, (8, 7), 4, norm="batch", **options)  # type: ignore[arg-type]
    return [(type(m).__name__, tuple(m.weight.shape) if hasattr(m, "weight") else ()) for m in projector.layers]


def test_hidden_layers_are_normalised_and_the_last_one_where_asked() -> None:
    hidden = [("Linear", (8, 6)), ("BatchNorm", (8,)), ("ReLU", ()), ("Linear", (7, 8)), ("BatchNorm", (7,))]
    assert list_layers() == [*hidden, ("ReLU", ()), ("Linear", (4, 7))]
    assert list_layers(last_norm=True) == [*hidden, ("ReLU", ()), ("Linear", (4, 7)), ("BatchNorm", (4,))]
    projector = Projector(6, (8, 7), 4, norm="batch")
    assert all(m.bias is None for m in projector.modules() if isinstance(m, nn.Linear))


def test_without_hidden_layers_it_is_linear() -> None:
    projector, x = Projector(6, (), 4, norm="batch"), torch.randn(3, 6)
    torch.testing.assert_close(projector(x), x @ projector.layers[0].weight.T)  # type: ignore[operator]


def test_results_are_single_precision_or_wider() -> None:
    projector, x = Projector(6, (8,), 4, norm="batch"), torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projector(x).dtype == torch.float32
        assert projector.layers(x).dtype == torch.bfloat16
    assert projector.double()(x.double()).dtype == torch.float64


def test_pooling_is_the_class_token_where_there_is_one() -> None:
    vit = Encoder({"name": "timm", "model": "test_vit", "img_size": 8, "patch_size": 4}, 8)
    convnet = build_encoder({}, 8)
    assert [choose_pooling(encoder, None) for encoder in (vit, convnet)] == ["cls", "avg"]
    assert choose_pooling(vit, "avg") == "avg"
    with pytest.raises(ValueError, match=r"^pool: 'cls' needs a class token, and convnet has none; valid: avg"):
        choose_pooling(convnet, "cls")


@pytest.mark.parametrize(("hidden", "out", "last_norm", "width"), [((64, 9), 4, False, 9), ((64,), 32, True, 32)])
def test_groups_of_one_value_are_refused(hidden: tuple[int, ...], out: int, last_norm: bool, width: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^norm: 'group' is not valid for a layer as wide as {width}, .* batch, sync"
    ):
        Projector(6, hidden, out, norm="group", last_norm=last_norm)
    x = torch.randn(5, 6)
    assert Projector(6, (64,), 64, norm="group", last_norm=True)(x).std(0).min() > 0

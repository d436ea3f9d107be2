"""The head: cosines to prototypes, precision, and a frozen layer that still has a gradient."""

import pytest
import torch
import torch.nn.functional as F

from firstlight.tasks.self_distillation.prototype_head import PrototypeHead, PrototypeLayer


def build_head(**options: object) -> PrototypeHead:
    torch.manual_seed(0)
    return PrototypeHead(6, (8, 8), 4, 10, **options)  # type: ignore[arg-type]


def test_logits_are_cosines_of_the_bottleneck_and_the_prototypes() -> None:
    head = build_head()
    x = torch.randn(5, 6)
    found, squeezed = head(x), head.layers(x)
    wanted = F.cosine_similarity(squeezed[:, None], head.prototypes.direction[None], dim=2)
    torch.testing.assert_close(found, wanted)


def test_head_is_lightlys_with_the_same_weights() -> None:
    heads = pytest.importorskip("lightly.models.modules.heads")
    theirs, ours = heads.DINOProjectionHead(6, 8, 4, 10), build_head()
    kinds = [[m for m in layers if isinstance(m, torch.nn.Linear)] for layers in (theirs.layers, ours.layers)]
    assert len(kinds[0]) == len(kinds[1]) == 3
    for source, target in zip(*kinds, strict=True):
        target.load_state_dict(source.state_dict())
    ours.prototypes.direction.data.copy_(theirs.last_layer.weight_v.data)
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("learn_lengths", [False, True])
def test_lengths_are_one_and_learned_only_where_asked(learn_lengths: bool) -> None:
    layer = PrototypeLayer(4, 10, learn_lengths)
    layer(torch.randn(3, 4)).square().sum().backward()
    assert {name for name, _ in layer.named_parameters()} == {"direction"} | ({"scale"} if learn_lengths else set())
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    layer.direction.data.mul_(7.0)
    torch.testing.assert_close(layer(torch.eye(4)).norm(dim=0), torch.ones(10))


def test_frozen_layer_has_a_gradient_of_zero_and_the_same_logits() -> None:
    layer, x = PrototypeLayer(4, 10, True), torch.randn(3, 4, requires_grad=True)
    free = layer(x)
    layer.is_frozen = True
    frozen = layer(x)
    assert torch.equal(frozen, free)
    frozen.square().sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("norm", ["none", "batch", "sync", "group"])
def test_hidden_layers_have_the_norm(norm: str) -> None:
    head = build_head(norm=norm)
    assert head(torch.randn(5, 6)).shape == (5, 10)
    assert sum("running_mean" in name for name, _ in head.named_buffers()) == (2 if norm in ("batch", "sync") else 0)


def test_logits_are_in_single_precision_under_autocast() -> None:
    head, x = build_head(), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head(x), rtol=0.1, atol=0.05)

import math

import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.nn.norms import norm_layer
from firstlight.tasks.nn.weight_init import Init, initialize

FANS = {"convolution": (64 * 9, 96 * 9), "linear": (512, 256)}  # in, out


def network() -> nn.ModuleDict:
    layers = {"convolution": nn.Conv2d(64, 96, 3), "norm": norm_layer("batch", 96), "linear": nn.Linear(512, 256)}
    return nn.ModuleDict({**layers, "nested": nn.Sequential(nn.ConvTranspose2d(64, 96, 3))})


def drawn(init: Init, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(0)
    net = network()
    for parameter in net["norm"].parameters():
        parameter.data.fill_(3.0)
    torch.manual_seed(seed)
    initialize(net, init)
    return net


def weights(net: nn.ModuleDict, layer: str) -> Tensor:
    return net.get_parameter(f"{layer}.weight").detach()


def same(a: nn.Module, b: nn.Module) -> list[bool]:
    return [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]


def test_default_leaves_all_weights() -> None:
    torch.manual_seed(0)
    net = network()
    before = [p.clone() for p in net.parameters()]
    initialize(net, "default")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("init", ["gaussian", "he", "xavier"])
def test_all_weights_are_drawn_anew_and_biases_are_zero(init: Init) -> None:
    before, net = drawn("default"), drawn(init)
    for name in ("convolution", "linear", "nested.0"):
        assert not torch.equal(weights(net, name), weights(before, name))
        assert not net.get_parameter(f"{name}.bias").any()
    assert all(bool((p == 3).all()) for p in net["norm"].parameters()), "norms keep theirs"


@pytest.mark.parametrize("init", ["gaussian", "he", "xavier"])
def test_the_draw_is_that_of_the_seed(init: Init) -> None:
    assert all(same(drawn(init, 1), drawn(init, 1)))
    assert not all(same(drawn(init, 1), drawn(init, 2)))


@pytest.mark.parametrize("layer", list(FANS))
def test_the_spread_is_that_of_the_papers(layer: str) -> None:
    fan_in, fan_out = FANS[layer]
    expected: dict[Init, float] = {
        "gaussian": 0.01,
        "he": math.sqrt(2 / fan_in),
        "xavier": math.sqrt(2 / (fan_in + fan_out)),
    }
    for init, spread in expected.items():
        weight = weights(drawn(init), layer)
        assert float(weight.std()) == pytest.approx(spread, rel=0.02)
        assert float(weight.mean()) == pytest.approx(0, abs=4 * spread / math.sqrt(weight.numel()))


def test_gaussian_and_he_are_normal_and_xavier_is_uniform() -> None:
    kurtosis: dict[str, float] = {}
    inits: tuple[Init, ...] = ("gaussian", "he", "xavier")
    for init in inits:
        weight = weights(drawn(init), "convolution")
        kurtosis[init] = float((weight.double() ** 4).mean() / weight.double().var() ** 2)
    assert kurtosis == pytest.approx({"gaussian": 3, "he": 3, "xavier": 1.8}, abs=0.1)

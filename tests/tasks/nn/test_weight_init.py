import math

import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import norm_layer
from firstlight.tasks.nn.weight_init import LSUV_TOLERANCE, Init, initialize_lsuv, initialize_weights, set_biases

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
    initialize_weights(net, init)
    return net


def weights(net: nn.ModuleDict, layer: str) -> Tensor:
    return net.get_parameter(f"{layer}.weight").detach()


def same(a: nn.Module, b: nn.Module) -> list[bool]:
    return [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]


def test_default_leaves_all_weights() -> None:
    torch.manual_seed(0)
    net = network()
    before = [p.clone() for p in net.parameters()]
    initialize_weights(net, "default")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("init", ["gaussian", "he", "xavier"])
def test_all_weights_are_redrawn_and_biases_are_zero(init: Init) -> None:
    before, net = drawn("default"), drawn(init)
    for name in ("convolution", "linear", "nested.0"):
        assert not torch.equal(weights(net, name), weights(before, name))
        assert not net.get_parameter(f"{name}.bias").any()
    assert all(bool((p == 3).all()) for p in net["norm"].parameters()), "norms keep theirs"


def test_biases_are_set_where_a_layer_has_them_and_none_leaves_them() -> None:
    net, before = drawn("default"), drawn("default")
    set_biases(net, None)
    assert all(same(net, before))
    set_biases(net, 0.25)
    for name in ("convolution", "linear", "nested.0"):
        assert bool((net.get_parameter(f"{name}.bias") == 0.25).all())
        assert torch.equal(weights(net, name), weights(before, name))
    assert all(bool((p == 3).all()) for p in net["norm"].parameters())


@pytest.mark.parametrize("init", ["gaussian", "he", "xavier"])
def test_weights_depend_on_the_seed(init: Init) -> None:
    assert all(same(drawn(init, 1), drawn(init, 1)))
    assert not all(same(drawn(init, 1), drawn(init, 2)))


@pytest.mark.parametrize("layer", list(FANS))
def test_standard_deviation_is_that_of_the_paper(layer: str) -> None:
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


def output_variances(network: nn.Module, images: Tensor) -> list[float]:
    """The variances of the outputs of the convolutions, in the order of computation."""
    found: list[float] = []
    handles = [
        m.register_forward_hook(lambda _, __, out: found.append(float(out.var())))
        for m in network.modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return found


def test_lsuv_gives_every_layer_outputs_of_unit_variance() -> None:
    torch.manual_seed(0)
    for norm in ("none", "batch"):
        layers = [
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        ]
        network = nn.Sequential(*(m for m in layers if norm == "batch" or not isinstance(m, nn.BatchNorm2d))).train()
        images = torch.rand(32, 3, 12, 12) * 7 + 3
        before = output_variances(network, images)
        assert not all(abs(v - 1) < LSUV_TOLERANCE for v in before)
        initialize_lsuv(network, images)
        assert all(abs(v - 1) < LSUV_TOLERANCE for v in output_variances(network, images))


def test_lsuv_changes_only_weights_of_convolutions() -> None:
    torch.manual_seed(0)
    encoder = Encoder({"name": "resnet18", "stem": "cifar"}, 16).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    initialize_lsuv(encoder, torch.rand(8, 3, 16, 16))
    changed = {k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])}
    convolutions = {f"{name}.weight" for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    assert changed == convolutions


def test_lsuv_filters_are_orthogonal_up_to_their_scale() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    initialize_lsuv(network, torch.rand(16, 3, 10, 10))
    rows = network[0].weight.flatten(1)  # type: ignore[union-attr, operator]
    products = rows @ rows.T
    assert torch.allclose(products, torch.eye(8) * products[0, 0], atol=1e-4)


def test_lsuv_of_a_constant_input_stays_finite() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    initialize_lsuv(network, torch.zeros(4, 3, 5, 5))
    assert all(torch.isfinite(p).all() for p in network.parameters())

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.nn.rescaling import (
    RESPONSE_MEAN,
    balance_change_rates,
    find_hidden_layers,
    measure_change_rates,
    normalize_responses,
)
from firstlight.tasks.nn.weight_init import WeightedLayer


def chain(bias: bool = True) -> nn.Sequential:
    """Convolutions, a deconvolution and linear layers of very different scales, in double precision."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3, bias=bias), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 3, stride=2, bias=bias), nn.ReLU(), nn.Flatten(1)),
        *(nn.Linear(6 * 11 * 11, 16, bias=bias), nn.ReLU()),
        *(nn.Linear(16, 12, bias=bias), nn.ReLU()),
        nn.Linear(12, 5),
    ]
    network = nn.Sequential(*layers).double()
    for layer, scale in zip(weighted(network), (30.0, 0.2, 5.0, 0.01, 1.0), strict=True):
        layer.weight.data *= scale
    return network


def weighted(network: nn.Module) -> list[WeightedLayer]:
    return [module for module in network.modules() if isinstance(module, WeightedLayer)]


IMAGES = torch.rand(32, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def on_images(network: nn.Module) -> Callable[[], Tensor]:
    return lambda: network(IMAGES)  # type: ignore[no-any-return]


def responses(network: nn.Module) -> list[Tensor]:
    """The (channels, n) outputs of each layer, in order."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda layer, _, out: found.append(out.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1))
        )
        for layer in weighted(network)
    ]
    with torch.no_grad():
        network(IMAGES)
    for handle in handles:
        handle.remove()
    return found


def test_responses_get_the_mean_and_variance_of_the_paper_channel_by_channel() -> None:
    network = chain()
    layers = weighted(network)
    directions = [nn.functional.normalize(layer.weight.detach().flatten(1), dim=1) for layer in layers]
    normalize_responses(on_images(network), layers)
    for k, channels in enumerate(responses(network)):
        assert channels.mean(1).tolist() == pytest.approx([RESPONSE_MEAN] * len(channels), abs=1e-9), k
        assert channels.std(1, correction=0).tolist() == pytest.approx([1.0] * len(channels), rel=1e-9), k
    for layer, before in zip(layers, directions, strict=True):
        if not isinstance(layer, nn.ConvTranspose2d):
            now = nn.functional.normalize(layer.weight.detach().flatten(1), dim=1)
            torch.testing.assert_close(now, before, msg="a channel keeps its filter up to its scale")


def test_the_run_that_normalises_gives_what_the_normalised_network_gives() -> None:
    """Later layers are normalised by what the layers before them give after their normalisation."""
    network = chain()
    seen: list[Tensor] = []
    normalize_responses(lambda: seen.append(network(IMAGES)), weighted(network))
    torch.testing.assert_close(seen[0], network(IMAGES))


def test_layers_without_biases_get_only_the_variance_and_constant_channels_stay() -> None:
    network = chain(bias=False)
    layers = weighted(network)
    layers[0].weight.data[2] = 0.0
    normalize_responses(on_images(network), layers)
    assert not layers[0].weight[2].any()
    spreads = responses(network)[0].std(1, correction=0)
    assert spreads.tolist() == pytest.approx([0.0 if channel == 2 else 1.0 for channel in range(8)], rel=1e-9)
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())


def root_mean_square(values: Any) -> float:
    return math.sqrt(sum(value * value for value in values.flatten().tolist()) / values.numel())


def naive_rates(network: nn.Sequential) -> list[float]:
    """The root mean square of each layer's gradient over that of its weights, by autograd on a sum."""
    layers = weighted(network)[:-1]
    out = network(IMAGES)
    random = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    network.zero_grad()
    (out * random).sum().backward()
    return [root_mean_square(layer.weight.grad) / root_mean_square(layer.weight) for layer in layers]


def test_rates_are_those_of_the_formula() -> None:
    network = chain()
    found = measure_change_rates(on_images(network), network, (network[-1],))
    assert list(found) == weighted(network)[:-1]
    assert list(found.values()) == pytest.approx(naive_rates(network), rel=1e-9)


def test_balanced_layers_change_at_the_same_rate_and_the_network_computes_the_same() -> None:
    network = chain()
    before, rates = network(IMAGES).detach(), naive_rates(network)
    assert max(rates) / min(rates) > 100
    weights = [layer.weight.detach().clone() for layer in weighted(network)]
    balance_change_rates(on_images(network), network, (network[-1],))
    assert max(naive_rates(network)) / min(naive_rates(network)) < 1.01
    torch.testing.assert_close(network(IMAGES).detach(), before, rtol=1e-9, atol=1e-12)
    target = math.prod(rates) ** (1 / len(rates))
    for layer, old, rate in zip(weighted(network), weights, rates, strict=False):
        torch.testing.assert_close(layer.weight.detach(), old * math.sqrt(rate / target), rtol=1e-6, atol=0)
    assert torch.equal(weighted(network)[-1].weight, weights[-1]), "the outputs' layer is left as it was drawn"


def test_channels_of_a_layer_stay_alike_when_layers_are_balanced() -> None:
    network = chain()
    normalize_responses(on_images(network), weighted(network)[:-1])
    balance_change_rates(on_images(network), network, (network[-1],))
    for channels in responses(network)[:-1]:
        spreads = channels.std(1, correction=0)
        torch.testing.assert_close(spreads, spreads.mean().expand_as(spreads), rtol=1e-9, atol=0)
        torch.testing.assert_close(channels.mean(1), RESPONSE_MEAN * spreads, rtol=1e-6, atol=1e-9)


def test_frozen_layers_are_rescaled_and_stay_frozen() -> None:
    network = chain()
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)
    before = network[0].weight.detach().clone()
    balance_change_rates(on_images(network), network, (network[-1],))
    assert not torch.equal(network[0].weight, before)
    assert [layer.weight.requires_grad for layer in weighted(network)] == [False, True, True, True, True]
    assert all(parameter.grad is None for parameter in network.parameters())


class Forked(nn.Module):
    """A network of whose layers one does not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        self.beside(hidden.detach())
        return self.last(hidden)  # type: ignore[no-any-return]


def test_layers_that_the_outputs_do_not_depend_on_are_left_alone() -> None:
    network, x = Forked(), torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    assert find_hidden_layers(lambda: network(x), network, (network.last,)) == [network.first]
    before = network.beside.weight.detach().clone()
    balance_change_rates(lambda: network(x), network, (network.last,))
    assert torch.equal(network.beside.weight, before)

"""The average of weights: its formula, its exchange with the weights, its state."""

import torch
from torch import nn

from firstlight.pipeline.train.weight_average import WeightAverage


def build_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    network[2].requires_grad_(False)
    return network


def change_weights(network: nn.Module, step: int) -> None:
    """An update of the trained parameters, and of the running statistics."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.1 * (step + 1)))
    network.train()(torch.rand(4, 2, generator=torch.Generator().manual_seed(step)))


def test_average_follows_its_formula() -> None:
    network = build_network()
    average = WeightAverage(network, 0.6)
    expected = {name: tensor.clone().double() for name, tensor in network.state_dict().items()}
    for step in range(12):
        change_weights(network, step)
        average.update(step)
        momentum = min(0.6, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = momentum * expected[name] + (1 - momentum) * tensor.double()
            else:
                expected[name] = tensor.clone().double()
    assert min(0.6, 12 / 21) < 0.6, "the momentum still rises"
    assert not [name for name in average.state_dict() if name.startswith("2.")], "a frozen layer has no average"
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_exchange_is_undone_after_the_block() -> None:
    network = build_network()
    average = WeightAverage(network, 0.9)
    for step in range(3):
        change_weights(network, step)
        average.update(step)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    with average.applied():
        for name, tensor in kept.items():
            assert torch.equal(network.state_dict()[name], tensor)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(average.state_dict()[name], tensor) for name, tensor in kept.items())

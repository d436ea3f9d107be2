"""Grouped convolutions train in single precision, with the parameters and names that they had."""

import copy
import pickle

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from firstlight.pipeline.train.accelerator.grouped_convolutions import grouped_in_fp32


def build_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), Conv2dSame(8, 8, 3, stride=2, groups=4), nn.Conv2d(8, 4, 1)
    )


def list_formats(network: nn.Sequential, images: torch.Tensor) -> list[torch.dtype]:
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for layer in network:
            images = layer(images)
            found.append(images.dtype)
    return found


def test_only_grouped_convolutions_leave_mixed_precision() -> None:
    network, images = build_network(), torch.rand(2, 3, 12, 12)
    assert list_formats(network, images) == [torch.bfloat16] * 4
    expected = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    with grouped_in_fp32(network):
        assert list_formats(network, images) == expected
        with grouped_in_fp32(network):
            assert list_formats(network, images) == expected
        assert list_formats(network, images) == expected, "the outer block goes on"
        copied = copy.deepcopy(network)
        assert list_formats(copied, images) == expected
        with torch.no_grad():
            copied[1].weight.zero_()
        assert network[1].weight.abs().sum() > 0, "a copy has weights of its own"


def test_network_is_as_before_after_the_block_and_after_an_error_in_it() -> None:
    network, images = build_network(), torch.rand(2, 3, 12, 12)
    kinds = [type(layer) for layer in network]
    with grouped_in_fp32(network):
        names = [type(layer).__name__ for layer in network]
    assert names == ["Conv2d", "SinglePrecisionConv2d", "SinglePrecisionConv2dSame", "Conv2d"]
    assert [type(layer) for layer in network] == kinds
    with pytest.raises(RuntimeError), grouped_in_fp32(network):
        network(images[:, :1])
    assert [type(layer) for layer in network] == kinds
    assert torch.equal(pickle.loads(pickle.dumps(network))(images), network(images))


def test_other_number_formats_of_weights_are_left_as_they_are() -> None:
    network, images = build_network(), torch.rand(2, 3, 12, 12)
    expected = network(images)
    with grouped_in_fp32(network):
        assert torch.equal(network(images), expected)
        network.double()
        assert network(images.double()).dtype == torch.float64


@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_are_close_to_those_of_single_precision(groups: int) -> None:
    torch.manual_seed(0)
    layer, images = nn.Conv2d(8, 8, 3, groups=groups), torch.randn(4, 8, 10, 10)
    layer(images).square().mean().backward()
    assert layer.weight.grad is not None
    exact, layer.weight.grad = layer.weight.grad, None
    with grouped_in_fp32(nn.Sequential(layer)), torch.autocast("cpu", torch.bfloat16):
        found = layer(images)
    found.float().square().mean().backward()
    assert layer.weight.grad is not None
    if groups > 1:
        assert torch.equal(layer.weight.grad, exact)
    else:
        torch.testing.assert_close(layer.weight.grad, exact, rtol=0.05, atol=0.01)

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.nn.batch_norm_folding import fold_batch_norms
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import norm_layer

SPECS: list[dict[str, Any]] = [
    {"name": "alexnet", "stem": "cifar", "input": "sobel", "normalize": "image"},
    {"name": "resnet18", "stem": "cifar"},
    {"name": "vgg16", "norm": "sync"},
    {"name": "network1", "m": [2, 2, 0, 0], "width": 4},
    {"name": "convnet", "width": 4, "depth": 2, "input": "rgb_sobel"},
    {"name": "torchvision", "model": "resnet18"},
    {"name": "timm", "model": "efficientnet_lite0"},
]


def seen_much(network: nn.Module) -> nn.Module:
    """The network with batch normalisations as after a training: no statistic and no weight is 0 or 1."""
    torch.manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0.0, 0.5)
            norm.running_var.uniform_(0.3, 3.0)
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias, 0.0, 0.5)
    return network


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(str(v) for v in spec.values())[:24])
def test_folded_network_computes_the_same_function_without_batch_normalisation(spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = seen_much(Encoder(spec, 32))
    images = torch.rand(4, 3, 32, 32)
    before = encoder.eval()(images)
    fold_batch_norms(encoder.train(), torch.rand(2, 3, 32, 32))
    assert encoder.training
    assert not any(isinstance(module, _BatchNorm) for module in encoder.modules())
    # The outputs are equal in training mode, too: nothing is left that has modes.
    for found, expected in zip(encoder(images), before, strict=True):
        assert float((found - expected).detach().abs().max()) <= 1e-5 * float(expected.abs().max())


def test_folded_network_in_double_precision_is_equal_to_rounding() -> None:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3, groups=1, bias=False), norm_layer("batch", 8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 3, stride=2), norm_layer("batch", 6), nn.ReLU(), nn.Flatten(1)),
        *(nn.Linear(6 * 15 * 15, 5), norm_layer("batch", 5)),
    ]
    network = seen_much(nn.Sequential(*layers)).double().eval()
    images = torch.rand(4, 3, 9, 9, dtype=torch.float64)
    before = network(images)
    fold_batch_norms(network, images)
    torch.testing.assert_close(network(images), before, rtol=1e-12, atol=1e-12)


def test_activation_inside_of_a_normalisation_stays() -> None:
    from timm.layers import BatchNormAct2d

    network = seen_much(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))).eval()
    images = torch.rand(2, 3, 8, 8)
    before = network(images)
    fold_batch_norms(network, images)
    torch.testing.assert_close(network(images), before)
    assert float(before.detach().min()) == 0.0


def test_new_biases_are_trained_with_their_weights() -> None:
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2}, 8)
    first, second = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    first.weight.requires_grad_(False)
    fold_batch_norms(encoder, torch.rand(2, 3, 8, 8))
    assert first.bias is not None
    assert second.bias is not None
    assert (first.bias.requires_grad, second.bias.requires_grad) == (False, True)
    assert [len(block) for block in encoder.parameter_blocks()] == [0, 2]


class Branching(nn.Module):
    """Uses the output of a convolution beside its normalisation, so the two cannot become one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), norm_layer("batch", 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y  # type: ignore[no-any-return]


def test_network_that_cannot_be_folded_is_left_as_it_was() -> None:
    network = seen_much(Branching()).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="computes something else"):
        fold_batch_norms(network, torch.rand(2, 3, 8, 8))
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert network.training


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "convnet", "norm": "group", "width": 4, "depth": 2}, "the network has no batch normalisation"),
        ({"name": "densenet121", "stem": "cifar"}, r"\d+ of the network's 121 batch normalisations follow no convol"),
    ],
)
def test_reason_against_folding_is_given(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold_batch_norms(Encoder(spec, 16), torch.rand(2, 3, 16, 16))

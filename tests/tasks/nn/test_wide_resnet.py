import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import SyncBatchNorm
from firstlight.tasks.nn.wide_resnet import wide_resnet

SMALL = {"name": "wide_resnet", "depth": 16, "widen": 1}


def test_wrn_28_2_has_its_maps_and_weights() -> None:
    encoder = Encoder({"name": "wide_resnet"}, 32)
    assert encoder.shapes == [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    convolutions = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert sum(layer.kernel_size == (3, 3) for layer in convolutions) == 25, "28 less three shortcuts"
    assert sum(layer.kernel_size == (1, 1) for layer in convolutions) == 3
    # The sum with the classifier of 10 classes, 128 x 10 + 10, is the published 1.47 million.
    weights = sum(p.numel() for p in encoder.parameters())
    assert weights + 1290 == 1_467_610


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (40, 4)])
def test_depth_and_width_are_those_asked_for(depth: int, widen: int) -> None:
    encoder = Encoder({"name": "wide_resnet", "depth": depth, "widen": widen}, 16)
    assert encoder.shapes == [(16, 16, 16), (16 * widen, 16, 16), (32 * widen, 8, 8), (64 * widen, 4, 4)]
    convolutions = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    # A group that does not change the channels has no shortcut of its own.
    assert len(convolutions) == depth - (widen == 1)


def test_first_map_of_the_code_of_fixmatch_is_computed() -> None:
    """Written from `ResNet.classifier` of FixMatch's code: which activations go where."""
    torch.manual_seed(0)
    stages = wide_resnet(3, depth=16, widen=2)
    network = nn.Sequential(*stages).eval()
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    convolutions = {(0, 0): stages[0]}
    blocks = [*stages[1], *stages[2], *stages[3][0]]  # type: ignore[index, misc]
    used = iter(norms)

    def activate(x: Tensor) -> Tensor:
        layer = next(used)
        mean, variance = layer.running_mean, layer.running_var
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-3).sqrt()  # type: ignore[index]
        return F.leaky_relu(x * layer.weight[:, None, None] + layer.bias[:, None, None], 0.1)

    image = torch.randn(2, 3, 16, 16)
    y = F.conv2d(image, convolutions[0, 0].weight, padding=1)  # type: ignore[arg-type]
    for place, block in enumerate(blocks):
        group, first = divmod(place, 2)
        stride = 2 if group > 0 and first == 0 else 1
        passed, x = y, activate(y)
        if place == 0:
            passed = x
        x = F.conv2d(x, block.layers[0].weight, stride=stride, padding=1)
        x = F.conv2d(activate(x), block.layers[3].weight, padding=1)
        if passed.shape[1] != x.shape[1]:
            passed = F.conv2d(passed, block.shortcut.weight, stride=stride)
        y = passed + x
    torch.testing.assert_close(network(image), activate(y), rtol=1e-4, atol=1e-4)
    assert next(used, None) is None, "every normalisation is used"


@pytest.mark.parametrize("momentum", [0.001, 0.1])
def test_normalisations_have_the_momentum_and_eps_of_fixmatch(momentum: float) -> None:
    spec = {**SMALL, "norm": "sync", "bn_momentum": momentum}
    norms = [layer for layer in Encoder(spec, 16).modules() if isinstance(layer, _BatchNorm)]
    assert len(norms) == 13
    assert all(isinstance(layer, SyncBatchNorm) for layer in norms)
    assert {(layer.momentum, layer.eps) for layer in norms} == {(momentum, 1e-3)}
    assert {layer.momentum for layer in Encoder(SMALL, 16).modules() if isinstance(layer, _BatchNorm)} == {0.001}


def test_weights_have_the_variance_of_their_outputs() -> None:
    for layer in nn.Sequential(*wide_resnet(3)).modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
            kernel = layer.kernel_size[0]
            assert float(layer.weight.var()) == pytest.approx(2 / (kernel**2 * layer.out_channels), rel=0.1)


@pytest.mark.parametrize("depth", [12, 27])
def test_depth_that_is_no_6_n_plus_4_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^depth: {depth} is not 6 n \+ 4; valid: (10|22), (16|28)"):
        Encoder({"name": "wide_resnet", "depth": depth}, 32)

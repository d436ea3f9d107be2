"""Wide residual networks (Zagoruyko and Komodakis 2016), as the code of FixMatch has them."""

from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.nn.norms import Norm, norm_layer

# The channels of the first convolution, and of the three groups of blocks before they are widened.
STEM_CHANNELS = 16
GROUP_CHANNELS = (16, 32, 64)
# The first convolution, two of each block and one shortcut of each group are the other layers.
LAYERS_BESIDE_BLOCKS, LAYERS_PER_BLOCK = 4, 6
LEAKY_SLOPE = 0.1
# TensorFlow's default, which FixMatch's code and TorchSSL have.
NORM_EPS = 1e-3


def wide_resnet(
    c_in: int,
    *,
    norm: Norm = "batch",
    depth: Annotated[int, Ge(10)] = 28,
    widen: Annotated[int, Ge(1)] = 2,
    bn_momentum: Annotated[float, Gt(0.0), Le(1.0)] = 0.001,
) -> list[nn.Module]:
    """Builds the wide residual network of FixMatch: WRN-28-2 by default, with 1.47 million weights. 32x32 -> 128x8x8.

    Blocks are normalised and activated before their convolutions, and activations are leaky ReLUs of slope 0.1. It
    gives a map after the first convolution and after each of three groups of blocks; the second and third halve the
    side.

    `depth`: the number of convolutions, 6 n + 4 for n blocks in each group.
    `widen`: the factor of the channels: the groups have 16, 32 and 64 times it.
    `bn_momentum`: the share of a batch in the running statistics of batch normalisations: 0.001 in the codes of
    FixMatch and TorchSSL, whose trainings have a million steps; one of a few thousand needs more, as torch's 0.1.

    Raises:
        ValueError: `depth` is no 6 n + 4.
    """
    if (depth - LAYERS_BESIDE_BLOCKS) % LAYERS_PER_BLOCK:
        near = depth - (depth - LAYERS_BESIDE_BLOCKS) % LAYERS_PER_BLOCK
        raise ValueError(f"depth: {depth} is not 6 n + 4; valid: {near}, {near + LAYERS_PER_BLOCK}, 28")
    count = (depth - LAYERS_BESIDE_BLOCKS) // LAYERS_PER_BLOCK
    stages: list[nn.Module] = [_convolution(c_in, STEM_CHANNELS, 3)]
    channels = STEM_CHANNELS
    for group, base in enumerate(GROUP_CHANNELS):
        blocks: list[nn.Module] = []
        for block in range(count):
            stride = 2 if block == 0 and group > 0 else 1
            blocks.append(_Block(channels, base * widen, stride, norm, activates_input=group == block == 0))
            channels = base * widen
        stages.append(nn.Sequential(*blocks))
    # The activation of the last block, which no block follows.
    stages[-1] = nn.Sequential(stages[-1], norm_layer(norm, channels), nn.LeakyReLU(LEAKY_SLOPE))
    for module in nn.ModuleList(stages).modules():
        if isinstance(module, _BatchNorm):
            module.momentum, module.eps = bn_momentum, NORM_EPS
    return stages


class _Block(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h / stride, w / stride).

    Args:
        activates_input: True sends the normalised and activated input through the shortcut, too.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, norm: Norm, *, activates_input: bool) -> None:
        super().__init__()
        self.activates_input = activates_input
        self.before = nn.Sequential(norm_layer(norm, c_in), nn.LeakyReLU(LEAKY_SLOPE))
        self.layers = nn.Sequential(
            _convolution(c_in, c_out, 3, stride),
            norm_layer(norm, c_out),
            nn.LeakyReLU(LEAKY_SLOPE),
            _convolution(c_out, c_out, 3),
        )
        self.shortcut = nn.Identity() if c_in == c_out else _convolution(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.before(x)
        passed: Tensor = self.shortcut(activated if self.activates_input else x)
        return passed + self.layers(activated)  # type: ignore[no-any-return]


def _convolution(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Returns a convolution without bias, with weights of N(0, 2 / (kernel^2 c_out)), as in FixMatch's code."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer

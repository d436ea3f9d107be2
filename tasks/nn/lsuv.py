"""Layer-sequential unit-variance initialisation (Mishkin and Matas 2016, "All you need is a good init", algorithm 1)."""

import torch
from torch import Tensor, nn

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
TOLERANCE, TRIES = 0.1, 10  # section 3: "the maximum number of iterations (T_max) prevents infinite loops"


@torch.no_grad()
def lsuv(network: nn.Module, images: Tensor) -> None:
    """Draw orthonormal weights (biases 0), then scale each layer in turn until its outputs on `images` have variance 1. Nothing else is changed.

    `images`: what `network` takes. The layers are scaled in the order in which they are computed.
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    layers: list[Layer] = []
    handles = [
        layer.register_forward_hook(lambda layer, _, __: layers.append(layer))
        for layer in network.modules()
        if isinstance(layer, Layer)
    ]
    network(images)
    for handle in handles:
        handle.remove()
    for layer in dict.fromkeys(layers):  # one that is used twice is scaled by its last use
        nn.init.orthogonal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for layer in dict.fromkeys(layers):
        _scale(network, layer, images)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])  # running statistics


def _scale(network: nn.Module, layer: Layer, images: Tensor) -> None:
    variances: list[float] = []
    handle = layer.register_forward_hook(lambda _, __, out: variances.append(float(out.float().var())))
    for _ in range(TRIES):
        network(images)
        if abs(variances[-1] - 1) < TOLERANCE or not variances[-1] > 0:
            break
        layer.weight /= variances[-1] ** 0.5
    handle.remove()

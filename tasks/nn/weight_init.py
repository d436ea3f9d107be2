"""Initial weights: the ways that the denoising auto-encoder's paper compares (table 2), and LSUV.

LSUV is the layer-sequential unit-variance initialisation (Mishkin and Matas 2016, "All you need is a good init",
algorithm 1), which scales weights by the activations of images.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["default", "gaussian", "he", "xavier"]
WeightedLayer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
LSUV_TOLERANCE = 0.1
# Section 3: "the maximum number of iterations (T_max) prevents infinite loops".
LSUV_MAX_TRIES = 10


def initialize_weights(module: nn.Module, init: Init) -> None:
    """Draws new weights for all convolutions and linear layers, and sets their biases to 0.

    `default` leaves them as torch (or the backbone) drew them. `gaussian` is N(0, 0.01^2) (section 3.4), `he`
    N(0, 2 / fan_in) (He et al. 2015), `xavier` uniform (Glorot and Bengio 2010).
    """
    if init == "default":
        return
    for layer in module.modules():
        if not isinstance(layer, WeightedLayer):
            continue
        if init == "gaussian":
            nn.init.normal_(layer.weight, std=0.01)
        elif init == "he":
            # The weight of a deconvolution has its input channels first: what torch calls its fan_out is its fan-in.
            mode = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
        else:
            nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def set_biases(module: nn.Module, value: float | None) -> None:
    """Sets the biases of all convolutions and linear layers; None leaves them."""
    for layer in module.modules():
        if value is not None and isinstance(layer, WeightedLayer) and layer.bias is not None:
            layer.bias.fill_(value)


@torch.no_grad()
def initialize_lsuv(network: nn.Module, images: Tensor) -> None:
    """Draws orthonormal weights (biases 0), then scales each layer until its outputs on `images` have variance 1.

    Nothing else is changed: buffers such as running statistics are restored.

    Args:
        network: the layers are scaled in the order in which they are computed.
        images: the input of `network`.
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    layers: list[WeightedLayer] = []
    handles = [
        layer.register_forward_hook(lambda layer, _, __: layers.append(layer))
        for layer in network.modules()
        if isinstance(layer, WeightedLayer)
    ]
    network(images)
    for handle in handles:
        handle.remove()
    # A layer that is used twice stands once in the list, and is scaled by its last use.
    for layer in dict.fromkeys(layers):
        nn.init.orthogonal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for layer in dict.fromkeys(layers):
        _scale_to_unit_variance(network, layer, images)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])


def _scale_to_unit_variance(network: nn.Module, layer: WeightedLayer, images: Tensor) -> None:
    variances: list[float] = []
    handle = layer.register_forward_hook(lambda _, __, out: variances.append(float(out.float().var())))
    for _ in range(LSUV_MAX_TRIES):
        network(images)
        if abs(variances[-1] - 1) < LSUV_TOLERANCE or not variances[-1] > 0:
            break
        layer.weight /= variances[-1] ** 0.5
    handle.remove()

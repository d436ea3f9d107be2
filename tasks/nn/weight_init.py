"""How fresh weights are drawn: torch's own way, or one of the three that the denoising auto-encoder's paper compares (table 2)."""

from typing import Literal

from torch import nn

Init = Literal["default", "gaussian", "he", "xavier"]


def initialize(module: nn.Module, init: Init) -> None:
    """Draw the weights of all convolutions and linear layers anew, biases 0. `default` leaves them as torch (or the backbone) drew them.

    gaussian: N(0, 0.01^2) (section 3.4); he: N(0, 2 / fan_in) (He et al. 2015); xavier: uniform (Glorot and Bengio 2010).
    """
    if init == "default":
        return
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
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

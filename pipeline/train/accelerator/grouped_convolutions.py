"""Grouped convolutions in single precision, within a training on CPUs in bfloat16.

Each group multiplies few numbers, at the least one channel (a depthwise convolution). A CPU that multiplies matrices of
bfloat16 faster has no use for it there, and the backward pass is slower by a factor: EfficientNet-Lite0 trained half as
fast in bfloat16 as in single precision.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class _SinglePrecision:
    """A convolution that leaves automatic mixed precision."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            found: Tensor = super().forward(images.float())  # type: ignore[misc]
        return found


@cache
def _derive(kind: type[nn.Conv2d]) -> type[Any]:
    return type(f"SinglePrecision{kind.__name__}", (_SinglePrecision, kind), {})


def keep_grouped_in_fp32(network: nn.Module) -> None:
    """Lets the grouped convolutions of a network compute in single precision under autocast.

    Their class becomes one that is derived from it, so that parameters, copies and saved weights are as before.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not isinstance(module, _SinglePrecision):
            module.__class__ = _derive(type(module))  # type: ignore[arg-type]

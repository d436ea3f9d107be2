"""Grouped convolutions in single precision, within a training on CPUs in bfloat16.

Each group multiplies few numbers, at the least one channel (a depthwise convolution). A CPU that multiplies matrices of
bfloat16 faster has no use for it there, and the backward pass is slower by a factor: EfficientNet-Lite0 trained half as
fast in bfloat16 as in single precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class _SinglePrecision:
    """A convolution that leaves automatic mixed precision."""

    weight: Tensor

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            found: Tensor = super().forward(images.to(self.weight.dtype))  # type: ignore[misc]
        return found


@cache
def _derive(kind: type[nn.Conv2d]) -> type[Any]:
    return type(f"SinglePrecision{kind.__name__}", (_SinglePrecision, kind), {})


@contextmanager
def grouped_in_fp32(network: nn.Module) -> Iterator[None]:
    """Lets the grouped convolutions of a network compute in the number format of their weights, also under autocast.

    In the block their class is one that is derived from it. Parameters, copies and saved weights are as before.
    """
    grouped = [
        (module, type(module))
        for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not isinstance(module, _SinglePrecision)
    ]
    for module, kind in grouped:
        module.__class__ = _derive(kind)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module, kind in grouped:
            module.__class__ = kind

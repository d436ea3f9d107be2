"""Large weights whose random numbers are drawn once, for tests in which only the place of a weight matters.

Most of the time of a test that builds a ResNet goes into the millions of random numbers of its layers, each of which is
drawn twice. Here, a large tensor is filled from a list of numbers that repeats, from a place that is drawn, so that
layers and seeds differ and the length of the list divides no shape.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

# A prime.
NUM_DRAWN = 1_000_003
LEAST_LARGE = 2_000


@cache
def _draw(name: str) -> Tensor:
    """Returns (NUM_DRAWN,) numbers, uniform in -1..1 or of a standard normal distribution."""
    generator = torch.Generator().manual_seed(0)
    if name == "normal_":
        return torch.randn(NUM_DRAWN, generator=generator)
    return 2 * torch.rand(NUM_DRAWN, generator=generator) - 1


def _fill(x: Tensor, name: str, scale: float, shift: float, generator: torch.Generator | None) -> Tensor:
    drawn, flat = _draw(name), x.detach().view(-1)
    start = int(torch.randint(NUM_DRAWN, (), generator=generator))
    done = 0
    while done < len(flat):
        part = drawn[start : start + len(flat) - done]
        torch.mul(part, scale, out=flat[done : done + len(part)])
        done, start = done + len(part), 0
    return x if shift == 0.0 else x.add_(shift)


def _is_large(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and x.numel() >= LEAST_LARGE


@contextmanager
def repeat_draws() -> Iterator[None]:
    """Returns a block in which large tensors are filled from few random numbers, in the same distributions.

    A truncated normal distribution is a uniform one in the block.
    """
    uniform, normal, erfinv = torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_

    def fill_uniform(
        x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        if not _is_large(x):
            return uniform(x, low, high, generator=generator)
        return _fill(x, "uniform_", (high - low) / 2, (high + low) / 2, generator)

    def fill_normal(
        x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        if not _is_large(x):
            return normal(x, mean, std, generator=generator)
        return _fill(x, "normal_", std, mean, generator)

    def keep_large(x: Tensor) -> Any:
        return x if _is_large(x) else erfinv(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", fill_uniform)
        patch.setattr(torch.Tensor, "normal_", fill_normal)
        patch.setattr(torch.Tensor, "erfinv_", keep_large)
        yield

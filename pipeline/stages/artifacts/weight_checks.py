"""Checks of weights and of the numbers of a spec, before a network is built of them."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

# Exceptions of a constructor that gets a spec from a file.
BUILD_ERRORS = (SafetensorError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError)
# Numbers of a spec up to this one are not compared with the weights.
SMALLEST_LIMIT = 1024


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a number among the weights is not finite; the message names its tensor."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has numbers that are not finite")


def check_spec_numbers(spec: Any, weights: Mapping[str, Tensor], key: str = "spec") -> None:
    """Raises ValueError if a number of a spec is larger than any size of the weights, and than their number of tensors.

    A network of so many channels or layers would be built before its weights are found not to fit.
    """
    for name, value in spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ():
        check_spec_numbers(value, weights, f"{key}.{name}")
    largest = max([len(weights), SMALLEST_LIMIT, *(size for tensor in weights.values() for size in tensor.shape)])
    if isinstance(spec, int) and abs(spec) > largest:
        raise ValueError(f"{key} is {spec}, and no size of the weights is larger than {largest}")

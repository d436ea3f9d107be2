"""Copies of arrays to a device, for which the host does not wait."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def send_array(values: Any, device: torch.device) -> Tensor:
    """Returns an array as a tensor on the device, which may be written to; a tensor that is there already as it is.

    To a GPU it goes by way of pinned memory. A copy from other memory would end only when the GPU has done all that it
    was asked for before.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements="W"))
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

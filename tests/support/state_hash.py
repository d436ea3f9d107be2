"""A hash of every bit of a training's state."""

import hashlib
import json
from typing import Any

import torch

from firstlight.pipeline.train.checkpoint import pack_state


def hash_state(state: Any) -> str:
    """Returns a sha256 over every bit of a nested state. It is equal for bit-identical states only."""
    tensors: dict[str, torch.Tensor] = {}
    content = hashlib.sha256(json.dumps(pack_state(state, tensors)).encode())
    for path in sorted(tensors):
        content.update(path.encode() + tensors[path].flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()

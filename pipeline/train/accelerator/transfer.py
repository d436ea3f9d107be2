"""Batches made on the training device beside its work."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from firstlight.tasks.learner import Batch


class BatchFeed:
    """Makes batches on a device beside its work: on a GPU the copies of a batch run during the step before it.

    The host has queued that step, and goes on to the next batch without waiting for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make_batch(self, make: Callable[[], Batch], is_on_device: bool) -> Batch:
        """Returns what `make` returns.

        `is_on_device`: True if it takes tensors that the device still computes, so that its work must follow theirs.
        """
        if self.stream is None or is_on_device:
            return make()
        with torch.cuda.stream(self.stream):
            batch = make()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in list_batch_tensors(batch):
            # Its memory is not given to a later batch before the step that uses it has ended.
            tensor.record_stream(current)
        return batch


def list_batch_tensors(batch: Batch) -> list[Tensor]:
    """Returns all tensors of a batch."""
    found: list[Tensor] = []
    for entry in fields(batch):
        value = getattr(batch, entry.name)
        found += [value] if isinstance(value, Tensor) else value.values() if isinstance(value, dict) else value
    return found

"""What the training loop trains: pretraining methods and downstream tasks alike."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.table import SampleTable


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch."""

    ids: Tensor  # (B,) int64
    labels: Tensor  # (B,) int64, -1 = unknown
    views: tuple[Tensor, ...]  # each (B, 3, H, W) float in 0..1


class Learner(nn.Module, ABC):
    """The loop knows only this class."""

    views: int = 1  # augmented views per image that `forward` takes
    tables: dict[str, SampleTable]  # empty, or state per image

    def __init__(self) -> None:
        super().__init__()
        self.tables = {}

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name. "loss" is minimised; its gradient, averaged over workers, is that of the global batch. All are logged, averaged."""

    def place(self, device: torch.device) -> None:
        """Move parameters, buffers and tables to the training device."""
        self.to(device)
        for table in self.tables.values():
            table.to(device)

    def begin_epoch(self, epoch: int) -> None:
        """Called on every worker before the first step of an epoch, and again when an epoch is resumed in its middle."""
        return

    def end_step(self) -> None:
        """Called after the optimiser's step: table writes become visible."""
        for table in self.tables.values():
            table.commit()

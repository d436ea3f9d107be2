"""What the training loop trains: pretraining methods and downstream tasks alike."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from firstlight.tasks.sample_table import SampleTable


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch."""

    ids: Tensor  # (B,) int64, of the images in the store: what random numbers are drawn by, with `passes`
    rows: Tensor  # (B,) int64, the places 0..size-1 of these images among those trained on: the keys of tables
    labels: Tensor  # (B,) int64, what may be learned from; -1 = unknown or withheld
    views: tuple[Tensor, ...]  # each (B, 3, H, W) float in 0..1
    passes: Tensor  # (B,) int64, which pass over its images each is in: the epoch, but labelled images may return within one
    # What a downstream task learns from besides labels, of the first view: `present` (B, C) int8, `mask` (B, H, W) uint8; `boxes` (B, K, 4) float
    # with `box_classes` (B, K) int64 and `difficult` (B, K) bool, K the most of an image, unused rows of class -1
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    def part(self, start: int, stop: int) -> "Batch":
        """The images start..stop of this batch."""
        views = tuple(view[start:stop] for view in self.views)
        targets = {name: target[start:stop] for name, target in self.targets.items()}
        return Batch(
            self.ids[start:stop],
            self.rows[start:stop],
            self.labels[start:stop],
            views,
            self.passes[start:stop],
            targets,
        )


class Learner(nn.Module, ABC):
    """The loop knows only this class.

    A step is `loss(embed(batch), batch)`. The two are apart so that a batch that does not fit into memory can be embedded in parts, while its
    loss, and the gradient, stay those of the whole batch, however the loss couples its images.
    """

    tables: dict[str, SampleTable]  # empty, or state per image
    looks_first: bool = False  # whether `look` is shown all batches of the first epoch before the first step

    def __init__(self) -> None:
        super().__init__()
        self.tables = {}

    @abstractmethod
    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """All that has parameters. Each output has B rows, and row i is of image i alone (up to batch statistics). No collectives."""

    @abstractmethod
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Scalars by name. "loss" is minimised; its gradient, averaged over workers, is that of the global batch. All are logged, averaged."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.embed(batch), batch)

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """What is trained: factors of the learning rate, and the parameters that each holds for. The first is the one that is logged."""
        return [(1.0, [parameter for parameter in self.parameters() if parameter.requires_grad])]

    def place(self, device: torch.device) -> None:
        """Move parameters, buffers and tables to the training device."""
        self.to(device)
        for table in self.tables.values():
            table.to(device)

    def look(self, batch: Batch) -> None:
        """Called without gradients, in evaluation mode, where `looks_first`; table writes become visible after each batch."""
        return

    def begin_epoch(self, epoch: int) -> None:
        """Called on every worker before the first step of an epoch, and again when an epoch is resumed in its middle."""
        return

    def end_step(self) -> None:
        """Called after the optimiser's step: table writes become visible."""
        for table in self.tables.values():
            table.commit()

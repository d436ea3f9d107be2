"""The contract between the training loop and everything it trains: pretraining methods and downstream tasks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.teacher import Teacher


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch."""

    # (B,) int64 ids of the images in the store. Random numbers are drawn by id and pass.
    ids: Tensor
    # (B,) int64 positions 0..size-1 of these images among the images trained on: the keys of tables.
    rows: Tensor
    # (B,) int64 labels that may be learned from; -1 = unknown or withheld.
    labels: Tensor
    # Each view is (B, C, S, S) float in 0..1; S may differ from view to view. C is 3 where no other number is stated.
    views: tuple[Tensor, ...]
    # (B,) int64 number of the pass over its images that each image is in: the epoch, except that labelled images may
    # return within one epoch.
    passes: Tensor
    # Targets of a downstream task besides labels, for the first view: `present` (B, C) int8, `mask` (B, H, W) uint8,
    # `boxes` (B, K, 4) float with `box_classes` (B, K) int64 and `difficult` (B, K) bool. K is the largest number of
    # boxes of an image; unused rows have class -1. If whole masks are scored, `whole_mask` (B, H, W) uint8 with
    # `whole_size` (B, 2) int64 (width, height), and `windows` (B, V, 4) float64: left, top, width and height of the
    # part of the image that is in each view. With masks and boxes, `region` (B, 4) float: left, top, right and bottom
    # of the part of the first view that shows the image; the rest is padding.
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    def select_range(self, start: int, stop: int) -> "Batch":
        """Returns the batch of the images start..stop-1 of this batch."""
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
    """A module that computes a loss of a batch. The training loop knows only this class.

    A step is `loss(embed(batch), batch)`. The two functions are separate so that a batch that does not fit into memory
    can be embedded in parts, while its loss and gradient stay those of the whole batch, however the loss couples its
    images.

    A step reads no value of a tensor on the host: a GPU would wait there (`python -m bench.host_reads` counts). Buffers
    are changed in place, and are the same tensors in every step: what a step with a loss that is not finite has changed
    is undone in them.
    """

    # State per image, by name; empty if the learner keeps none.
    tables: dict[str, SampleTable]
    # The factor of the learning rate from a feature map's layers to those of the map before it.
    layer_decay: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.tables = {}

    @abstractmethod
    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Computes everything that has parameters, without collectives.

        Each output has B rows, and row i depends on image i alone (up to batch statistics).
        """

    @abstractmethod
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns scalars by name. All are averaged over workers and logged.

        "loss" is minimised. Its gradient, averaged over workers, is the gradient of the global batch.
        """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.embed(batch), batch)

    def list_encoder_blocks(self) -> list[set[nn.Parameter]]:
        """Returns the encoder's parameters by feature map, shallow to deep; [] if there is no encoder."""
        return []

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Returns the trained parameters in groups, each with its factor of the learning rate.

        With `layer_decay`, the learner's own layers come first, then the encoder's by feature map, deep to shallow. The
        learning rate of the first group is the one that is logged.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        blocks = [] if self.layer_decay == 1.0 else self.list_encoder_blocks()
        if not blocks:
            return [(1.0, trained)]
        of_encoder = set[nn.Parameter]().union(*blocks)
        groups = [(1.0, [parameter for parameter in trained if parameter not in of_encoder])]
        for depth, block in enumerate(reversed(blocks)):
            groups.append((self.layer_decay**depth, [parameter for parameter in trained if parameter in block]))
        return [(factor, group) for factor, group in groups if group]

    def list_networks(self) -> list[nn.Module]:
        """Returns the networks whose forward passes `compile` compiles: the learner's own modules with parameters."""
        children = [child.network if isinstance(child, Teacher) else child for child in self.children()]
        return [child for child in children if next(child.parameters(), None) is not None]

    def compile_networks(self) -> None:
        """Compiles the networks in place, by torch.compile; names in their state stay as they are."""
        for network in self.list_networks():
            network.compile()  # type: ignore[no-untyped-call]

    def list_undecayed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that its networks exempt from weight decay, besides biases and normalisations.

        A network of timm names its position embeddings and class tokens in `no_weight_decay`.
        """
        found = []
        for module in self.modules():
            exempt: Any = getattr(module, "no_weight_decay", set)
            names = exempt()
            found += [parameter for name, parameter in module.named_parameters() if name in names]
        return found

    def move_to_device(self, device: torch.device) -> None:
        """Moves parameters, buffers and tables to the training device."""
        self.to(device)
        for table in self.tables.values():
            table.to(device)

    def reads_images_before(self, epoch: int) -> bool:
        """Returns True if `fill_tables` must see all batches of an epoch before its first step.

        The answer depends on the epoch alone.
        """
        return False

    def fill_tables(self, batch: Batch) -> None:
        """Writes a batch into the tables before an epoch, if `reads_images_before` it.

        The loop calls it without gradients, in evaluation mode. Table writes become visible after each batch.
        """
        return

    def begin_epoch(self, epoch: int) -> None:
        """Prepares an epoch, on every worker, before its first step and when it is resumed in its middle."""
        return

    def begin_step(self, step: int) -> None:
        """Prepares a step, on every worker; `step` counts from 0 over the whole training.

        A value that follows a schedule, such as a momentum or a temperature, is set here from `step` alone, so that a
        resumed training has it too.
        """
        return

    def end_step(self) -> None:
        """Makes table writes visible. The loop calls it after the optimiser's step."""
        for table in self.tables.values():
            table.commit()

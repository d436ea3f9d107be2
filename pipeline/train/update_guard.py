"""Keeps a step whose loss is not finite from changing anything, without a host that waits for the device.

To read the loss, the host would wait for all that a GPU has queued, in every step. So the device itself undoes what
such a step has changed, and all that follows it, until the host asks: at a log line, and before a checkpoint. On a CPU
there is no queue: the verdict lies in the host's memory, and the step ends before its update.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from firstlight.tasks.learner import Learner

# Integers as wide as the numbers of a tensor: their products with 0 and 1 keep every bit, and drop every NaN.
BIT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_host_memory(device: torch.device) -> bool:
    """Returns True if the host can look at a tensor of the device without waiting for it."""
    return device.type == "cpu"


class TensorCopies:
    """Copies of tensors on one device, from which they can be restored."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.copies = [torch.empty_like(tensor) for tensor in self.tensors]
        # The tensors are grouped by width, as an operation on a list takes one type.
        widths = sorted({tensor.element_size() for tensor in self.tensors})
        self._bits = [
            [
                [tensor.view(BIT_DTYPES[width]) for tensor in side if tensor.element_size() == width]
                for side in (self.tensors, self.copies)
            ]
            for width in widths
        ]

    @torch.no_grad()
    def keep_values(self) -> None:
        """Copies the tensors."""
        for current, kept in self._bits:
            torch._foreach_copy_(kept, current)

    @torch.no_grad()
    def restore_values(self) -> None:
        """Gives the tensors the values of their copies."""
        for current, kept in self._bits:
            torch._foreach_copy_(current, kept)

    @torch.no_grad()
    def restore_where(self, flag: Tensor) -> None:
        """Does so if `flag`, () bool on the device, is true; the host does not look at it. The copies are lost."""
        for current, kept in self._bits:
            bits: Tensor = flag.to(current[0].dtype)
            torch._foreach_mul_(current, 1 - bits)
            torch._foreach_mul_(kept, bits)
            torch._foreach_add_(current, kept)


class UpdateGuard:
    """The verdict on the losses of a training, and copies of what a step may change.

    On a CPU these are the buffers, as the networks' running statistics, which a forward pass changes. On other devices
    they are all parameters, those of teachers too, all buffers, the tensors of the optimiser that are on the device,
    and what `others` lists. A row of a table is not copied: `SampleTable.gate` keeps it.

    Args:
        learner: the learner. Its buffers, and those parameters, are the same tensors in every step.
        optimizer: its optimiser.
        others: returns further tensors that a step changes.
        device: that of the training.
        is_fused: True: the optimiser's kernel leaves out the update itself, as it has `found_inf`.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        others: Callable[[], Sequence[Tensor]],
        device: torch.device,
        is_fused: bool = False,
    ) -> None:
        self.learner, self.optimizer, self.others, self.device = learner, optimizer, others, device
        self.on_host = is_host_memory(device)
        self.is_fused = is_fused and not self.on_host
        # The verdict: 1 if a loss was not finite so far, the step of the first, and 1 if that was on this worker.
        self.verdict = torch.zeros(3, dtype=torch.int64, device=self.device)
        self.ids: Tensor | None = None
        self._copies: TensorCopies | None = None
        self._num_states = -1
        self._seen = self.verdict.numpy() if self.on_host else None
        self._gate = torch.ones((), dtype=torch.bool, device=self.device)
        if not self.on_host:
            for table in learner.tables.values():
                table.gate = self._gate

    def begin_step(self) -> None:
        """Copies what the step may change."""
        # The optimiser makes its tensors in its first step.
        if self._copies is None or self._num_states != len(self.optimizer.state):
            self._num_states = len(self.optimizer.state)
            self._copies = TensorCopies(self._list_changed())
        self._copies.keep_values()

    @torch.no_grad()
    def judge_losses(self, is_broken: Tensor, is_broken_here: Tensor, ids: Tensor, step: int) -> None:
        """Keeps the step and this worker's (B,) ids if this is the first loss that is not finite.

        `is_broken`: () bool, the same on all workers; `is_broken_here`: that of this worker.
        """
        facts = torch.stack((is_broken.long(), torch.full_like(self.verdict[0], step), is_broken_here.long()))
        is_known = self.verdict[0] > 0
        self.ids = ids.clone() if self.ids is None else torch.where(is_known, self.ids, ids)
        self.verdict.copy_(torch.where(is_known, self.verdict, facts))
        self._gate.copy_(self.verdict[0] == 0)
        if self.is_fused:
            self.optimizer.found_inf = self.verdict[0].float()  # type: ignore[attr-defined]

    @property
    def sees_break(self) -> bool:
        """True if a loss was not finite, and the host knows it without waiting."""
        return self._seen is not None and bool(self._seen[0])

    def undo_step(self) -> None:
        """Restores what was copied, and drops what tables were to take in."""
        assert self._copies is not None
        self._copies.restore_values()
        for table in self.learner.tables.values():
            table.discard()

    def end_step(self) -> None:
        """Has the device undo this step if a loss was not finite so far."""
        if not self.on_host:
            assert self._copies is not None
            self._copies.restore_where(~self._gate)

    def read_verdict(self) -> tuple[int, list[int]] | None:
        """Returns the step of the first loss that was not finite, and its ids if it was this worker's.

        Returns None if there was none. On a GPU this waits for the device.
        """
        is_broken, step, is_here = self.verdict.tolist()
        if not is_broken:
            return None
        assert self.ids is not None
        return step, self.ids.tolist() if is_here else []

    def _list_changed(self) -> list[Tensor]:
        buffers = [*self.learner.buffers()]
        if self.on_host:
            return buffers
        weights = [p for p in self.learner.parameters() if not (self.is_fused and p.requires_grad)]
        states = [] if self.is_fused else [v for state in self.optimizer.state.values() for v in state.values()]
        found = [v for v in states if isinstance(v, Tensor) and v.device.type == self.device.type]
        return [tensor for tensor in (*weights, *buffers, *found, *self.others()) if tensor.numel()]

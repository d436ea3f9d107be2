"""An exponential moving average of a learner's weights (Polyak averaging; `ema` of a training)."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# The average follows the weights faster at first: its momentum is at most (1 + step) / (EARLY_STEPS + step).
EARLY_STEPS = 10


class WeightAverage:
    """The average of the trained parameters and of the running statistics of a learner.

    After each step, average = m average + (1 - m) value, with m = min(`momentum`, (1 + step) / (10 + step)): with a
    constant momentum, the first weights would count for as long as 1 / (1 - momentum) steps. Whole numbers are copied.
    """

    def __init__(self, learner: nn.Module, momentum: float) -> None:
        self.learner, self.momentum = learner, momentum
        tensors = self._list_tensors()
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        # Listed once, since a step has no loop over weights: the average and what it follows, and then those copied.
        floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        self._followed, self._copied = (
            ([self.values[name] for name in names], [tensors[name].detach() for name in names])
            for names in (floats, [name for name in tensors if name not in floats])
        )

    def _list_tensors(self) -> dict[str, Tensor]:
        kept = set(self.learner.state_dict())
        trained = {name: p for name, p in self.learner.named_parameters() if p.requires_grad}
        return trained | {name: buffer for name, buffer in self.learner.named_buffers() if name in kept}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after the step `step`, counted from 0."""
        momentum = min(self.momentum, (1 + step) / (EARLY_STEPS + step))
        if self._followed[0]:
            torch._foreach_lerp_(*self._followed, 1.0 - momentum)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    @torch.no_grad()
    def exchange_weights(self) -> None:
        """Exchanges the average and the weights of the learner."""
        for name, tensor in self._list_tensors().items():
            value = tensor.clone()
            tensor.copy_(self.values[name])
            self.values[name].copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the learner the averaged weights within the block."""
        self.exchange_weights()
        try:
            yield
        finally:
            self.exchange_weights()

    def list_values(self) -> list[Tensor]:
        """Returns the tensors of the average."""
        return [*self.values.values()]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the average by the names of the learner's state."""
        return self.values

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies what `state_dict` has returned.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, value in self.values.items():
            value.copy_(state[name])

"""A teacher: a network whose weights follow those of the trained network (mean teacher, momentum encoder)."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def raise_momentum(start: float, step: int, steps: int, end: float = 1.0) -> float:
    """Returns the momentum of a teacher at `step` of `steps`: from `start` to `end` by a cosine.

    end - (end - start) (cos(pi step / steps) + 1) / 2. Source: BYOL, section 3.3; also DINO.
    """
    return start + (end - start) * (1.0 - (math.cos(math.pi * step / steps) + 1.0) / 2.0)


class Teacher(nn.Module):
    """A copy of a network that no gradient reaches, updated towards it after each step.

    The copy is a part of the method's state: it is saved, restored and moved with the method. The optimiser does not
    see it, as none of its parameters asks for a gradient. It is always in the mode of the method (`train` or `eval`):
    in a training its batch normalisations use the statistics of the batch.

    Args:
        network: the trained network; the copy starts with its weights. Its frozen parameters stay as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        # The weights and those that they follow: listed once, since a step has no loop over them.
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """Returns what the copy makes of `inputs`, without gradient."""
        return self.network(*inputs)

    @torch.no_grad()
    def follow(self, network: nn.Module, momentum: float) -> None:
        """Sets each weight to momentum * weight + (1 - momentum) * that of `network`.

        Buffers are not averaged: those of normalisations are running statistics of the teacher's own forward passes.
        It is the same network at every call. Collective in effect: all workers have the same weights before, and after.
        """
        if self._pairs is None:
            self._pairs = [*self.network.parameters()], [*network.parameters()]
        own, followed = self._pairs
        torch._foreach_lerp_(own, followed, 1.0 - momentum)

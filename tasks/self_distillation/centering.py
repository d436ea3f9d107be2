"""Targets of self-distillation: a teacher's logits as probabilities that cannot collapse to one prototype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.collective import all_sum, gather_over_workers


class Center(nn.Module):
    """The running mean of a teacher's logits, over the images of all workers (DINO, eq. 4).

    c <- momentum c + (1 - momentum) mean. It begins with zero. A batch counts from the next step on: `observe` keeps
    its mean, and `commit` takes it in.

    Args:
        size: the number of logits.
        momentum: the share of the centre that stays in a step.
    """

    value: Tensor

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(size))
        self.pending: Tensor | None = None

    @torch.no_grad()
    def observe(self, logits: Tensor, weights: Tensor | None = None) -> None:
        """Computes the mean of (..., size) logits over the images of all workers. It is collective.

        `weights`: (...) zeros and ones, the logits that count; None: all do. Without any, the centre stays.
        """
        rows = logits.flatten(0, -2)
        counted = rows.new_ones(len(rows)) if weights is None else weights.flatten().to(rows.dtype)
        totals = all_sum(torch.cat((counted @ rows, counted.sum()[None])))
        self.pending = torch.where(totals[-1] > 0, totals[:-1] / totals[-1].clamp_min(1.0), self.value)

    @torch.no_grad()
    def commit(self) -> None:
        """Takes in the mean of the last batch."""
        if self.pending is not None:
            self.value.lerp_(self.pending.to(self.value.dtype), 1.0 - self.momentum)
            self.pending = None


def sharpen_centred(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Returns softmax((logits - center) / temperature) over the last dimension (DINO, eqs. 1 and 4)."""
    return F.softmax((logits - center) / temperature, dim=-1)


@torch.no_grad()
def balance_assignments(
    logits: Tensor, temperature: float, counted: Tensor | None = None, iterations: int = 3
) -> Tensor:
    """Returns (B, K) probabilities of each image that use all prototypes alike, over all workers. It is collective.

    exp(logits / temperature) is scaled in turn so that each prototype has the same sum over the images of all workers,
    and each image the sum 1 (Sinkhorn and Knopp; SwAV, Caron et al. 2020, algorithm 1; DINOv2, section 4). Logarithms
    keep it from overflowing.

    Args:
        logits: (B, K).
        counted: (B,) bool, the images that take part; None: all do. The others get probabilities too.
        iterations: the number of times that both sums are set (authors' code: 3).
    """
    scaled = logits / temperature
    left_out = torch.zeros(len(logits), dtype=torch.bool, device=logits.device) if counted is None else ~counted
    # The least number, and not -inf: where no image counts at all, differences stay numbers.
    least = torch.finfo(logits.dtype).min / 4
    for _ in range(iterations):
        own = scaled.masked_fill(left_out[:, None], least).logsumexp(0, keepdim=True)
        scaled = scaled - gather_over_workers(own).logsumexp(0)
        scaled = scaled - scaled.logsumexp(1, keepdim=True)
    return scaled.exp()

"""The moments of a softmax over many rows: sums over parts of the rows, which add up to its log-partition and entropy.

Parts may be blocks of one worker's rows or the rows of other workers, so no logit of all rows is ever kept.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from firstlight.tasks.collective import COMMUNICATION, all_sum, select_own_rows, world_size
from firstlight.tasks.device.timer import time_part

# A logit without weight. It is finite: minus infinity times a weight of 0 would be NaN.
HIDDEN_LOGIT = -1e30


class Moments(NamedTuple):
    """Sums over bank rows m_j with weights w_j = exp(logit_j - peak), for each of b queries.

    The moments of parts of the bank add up to those of the whole.
    """

    # (b, 1): the largest logit.
    peak: Tensor
    # (b, 1 + e): the sum of w_j [1, m_j].
    zeroth: Tensor
    # (b, 1 + e): the sum of w_j (logit_j - peak) [1, m_j].
    first: Tensor

    @staticmethod
    def without_rows(like: Tensor, width: int) -> "Moments":
        """Returns the moments over no rows of size `width`, for as many queries as `like` has rows."""
        zero = like.new_zeros(len(like), 1 + width)
        return Moments(like.new_full((len(like), 1), HIDDEN_LOGIT), zero, zero)

    @staticmethod
    def from_row(logit: Tensor, row: Tensor) -> "Moments":
        """Returns the moments over one row for each query: (b, 1) logits of (b, e) rows."""
        zeroth = torch.cat((torch.ones_like(logit), row), 1)
        return Moments(logit, zeroth, torch.zeros_like(zeroth))

    def scale_weights(self, factor: float) -> "Moments":
        """Returns the moments of the same rows, each with `factor` times its weight."""
        return Moments(self.peak, factor * self.zeroth, factor * self.first)

    @staticmethod
    def from_logits(logits: Tensor, rows: Tensor) -> "Moments":
        """Returns the moments over (k, e) rows with (b, k) logits. The logits are overwritten."""
        peak = logits.amax(1, keepdim=True)
        logits -= peak
        weights = logits.exp()
        zeroth = torch.cat((weights.sum(1, keepdim=True), weights @ rows), 1)
        weights *= logits
        return Moments(peak, zeroth, torch.cat((weights.sum(1, keepdim=True), weights @ rows), 1))

    def with_peak(self, peak: Tensor) -> "Moments":
        """Returns the same sums with another peak, which must not be below this one."""
        lower = self.peak - peak
        factor = lower.exp()
        return Moments(peak, factor * self.zeroth, factor * (self.first + lower * self.zeroth))

    def add_moments(self, other: "Moments") -> "Moments":
        """Returns the moments over the rows of both."""
        peak = torch.maximum(self.peak, other.peak)
        a, b = self.with_peak(peak), other.with_peak(peak)
        return Moments(peak, a.zeroth + b.zeroth, a.first + b.first)

    def sum_over_workers(self) -> "Moments":
        """Returns the moments over the rows of all workers. It is collective."""
        if world_size() == 1:
            return self
        peak = self.peak.clone()
        with time_part(COMMUNICATION):
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        own = self.with_peak(peak)
        zeroth, first = all_sum(torch.cat((own.zeroth, own.first), 1)).chunk(2, 1)
        return Moments(peak, zeroth, first)

    def select_own_queries(self) -> "Moments":
        """Returns the moments of this worker's queries out of those of all workers."""
        return Moments(*(select_own_rows(sums) for sums in self))

    def log_partition(self) -> Tensor:
        """Returns (b,) log sum_j exp(logit_j)."""
        return (self.zeroth[:, :1].log() + self.peak)[:, 0]

    def entropy(self) -> Tensor:
        """Returns the (b,) entropy of the softmax over j."""
        return (self.zeroth[:, :1].log() - self.first[:, :1] / self.zeroth[:, :1])[:, 0]

    def mean_row(self) -> Tensor:
        """Returns (b, e) E[m]: the gradient of the log-partition by the query, times the temperature."""
        return self.zeroth[:, 1:] / self.zeroth[:, :1]

    def logit_covariance(self) -> Tensor:
        """Returns (b, e) E[logit m] - E[logit] E[m].

        It is minus the gradient of the entropy by the query, times the temperature.
        """
        return self.first[:, 1:] / self.zeroth[:, :1] - self.first[:, :1] / self.zeroth[:, :1] * self.mean_row()

"""A memory bank: the last embedding of every image, sharded over workers, against which the images of a batch are told apart.

Softmax over all n images (Wu et al. 2018; Super-AND, eq. 1) needs n logits per image, yet the log-partition, the entropy and both gradients
are moments of one weighted sum over the rows, so the bank is read once, `chunk` rows at a time, and no (b, n) tensor ever exists. A worker
sums over its own shard; what the workers must then exchange is as large as the batch, not as the bank.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from firstlight.tasks.collective import COMMUNICATION, all_sum, gather, mine, rank, world
from firstlight.tasks.counter_rng import keys, uniform
from firstlight.tasks.sample_table import TABLES, SampleTable
from firstlight.tasks.timer import part

QUERIES = 1024  # rows that look for their neighbour at a time: a tile of 1024 x chunk logits is 32 MB
HIDDEN = -1e30  # a logit without weight. Finite: minus infinity times a weight of 0 would be NaN
STREAM = 0x62616E6B  # tells the first rows from whatever else is drawn with this seed


class Moments(NamedTuple):
    """Sums over bank rows m_j with weights w_j = exp(logit_j - peak), for each of b queries. Sums over parts of the bank add up."""

    peak: Tensor  # (b, 1), the largest logit
    zeroth: Tensor  # (b, 1 + e), of w_j [1, m_j]
    first: Tensor  # (b, 1 + e), of w_j (logit_j - peak) [1, m_j]

    @staticmethod
    def none(like: Tensor, width: int) -> "Moments":
        zero = like.new_zeros(len(like), 1 + width)
        return Moments(like.new_full((len(like), 1), HIDDEN), zero, zero)

    @staticmethod
    def of(logits: Tensor, rows: Tensor) -> "Moments":
        """(b, k) logits, which are overwritten, and the (k, e) rows."""
        peak = logits.amax(1, keepdim=True)
        logits -= peak
        weights = logits.exp()
        zeroth = torch.cat((weights.sum(1, keepdim=True), weights @ rows), 1)
        weights *= logits
        return Moments(peak, zeroth, torch.cat((weights.sum(1, keepdim=True), weights @ rows), 1))

    def seen_from(self, peak: Tensor) -> "Moments":
        """The same sums with another peak, not below this one."""
        lower = self.peak - peak
        factor = lower.exp()
        return Moments(peak, factor * self.zeroth, factor * (self.first + lower * self.zeroth))

    def plus(self, other: "Moments") -> "Moments":
        peak = torch.maximum(self.peak, other.peak)
        a, b = self.seen_from(peak), other.seen_from(peak)
        return Moments(peak, a.zeroth + b.zeroth, a.first + b.first)

    def over_workers(self) -> "Moments":
        """Of the parts of the bank that all workers hold; collective."""
        if world() == 1:
            return self
        peak = self.peak.clone()
        with part(COMMUNICATION):
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        own = self.seen_from(peak)
        zeroth, first = all_sum(torch.cat((own.zeroth, own.first), 1)).chunk(2, 1)
        return Moments(peak, zeroth, first)

    def mine(self) -> "Moments":
        return Moments(*(mine(sums) for sums in self))

    def log_partition(self) -> Tensor:
        """(b,) log sum_j exp(logit_j)."""
        return (self.zeroth[:, :1].log() + self.peak)[:, 0]

    def entropy(self) -> Tensor:
        """(b,) of the softmax over j."""
        return (self.zeroth[:, :1].log() - self.first[:, :1] / self.zeroth[:, :1])[:, 0]

    def mean(self) -> Tensor:
        """(b, e) E[m]: the gradient of the log-partition by the query, times the temperature."""
        return self.zeroth[:, 1:] / self.zeroth[:, :1]

    def spread(self) -> Tensor:
        """(b, e) E[logit m] - E[logit] E[m]: minus the gradient of the entropy by the query, times the temperature."""
        return self.first[:, 1:] / self.zeroth[:, :1] - self.first[:, :1] / self.zeroth[:, :1] * self.mean()


def first_rows(ids: Tensor, dim: int, seed: int) -> Tensor:
    """(k,) ids -> (k, dim) from U(-sqrt(3/d), sqrt(3/d)), of length 1 on average only (authors' code); each row a function of (seed, id)."""
    parts = [uniform(keys(seed, torch.zeros_like(part), part, STREAM), dim) for part in ids.split(8192)]
    return (torch.cat(parts) * 2.0 - 1.0) * math.sqrt(3.0 / dim)


class MemoryBank(SampleTable):
    """`size` rows of `dim` float32. Queries are (b, dim); whatever is computed is in the wider type of query and row."""

    def __init__(self, size: int, dim: int, seed: int, chunk: int) -> None:
        super().__init__(size, (dim,), torch.float32, lambda ids: first_rows(ids, dim, seed))
        self.chunk = chunk

    @part(TABLES)
    def others(
        self, queries: Tensor, own: Tensor, temperature: float, own_logit: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(b, dim) queries of this worker and the (b,) ids of their own rows -> (b,) log sum over j != own of exp(m_j.v / temperature), and
        the (b,) entropy of the softmax over j != own, or over all j with the constant `own_logit` in the place of own's. Collective.
        """
        return _Others.apply(queries, self, own, temperature, own_logit)  # type: ignore[no-untyped-call,no-any-return]

    @torch.no_grad()
    @part(TABLES)
    def discover(self, temperature: float) -> tuple[Tensor, Tensor]:
        """For every row of the bank, on every worker: (size,) ids of the nearest other row (Super-AND, eq. 7; of equally near ones the lowest)
        and (size,) entropies of its softmax over all rows, itself included (eqs. 1 and 9). Exact; collective.
        """
        nearest = torch.empty(self.size, dtype=torch.int64, device=self.rows.device)
        entropy = self.rows.new_empty(self.size)
        for holder in range(world()):
            held = torch.arange(holder, self.size, world(), device=self.rows.device)
            for start in range(0, len(held), QUERIES):
                ids = held[start : start + QUERIES]
                queries = (
                    self.rows[start : start + QUERIES].clone()
                    if rank() == holder
                    else self.rows.new_empty(len(ids), *self.rows.shape[1:])
                )
                if world() > 1:
                    with part(COMMUNICATION):
                        dist.broadcast(queries, src=holder)
                nearest[ids], entropy[ids] = self._nearest(queries, ids, temperature)
        return nearest, entropy

    @torch.no_grad()
    @part(TABLES)
    def gram(self) -> Tensor:
        """(dim, dim) float64 M^T M, the same on every worker. Collective."""
        dim = self.rows.shape[1]
        total = self.rows.new_zeros(dim, dim, dtype=torch.float64)
        for _, rows in self._blocks(torch.float64):
            total += rows.T @ rows
        return all_sum(total)

    @torch.no_grad()
    @part(TABLES)
    def settle(self) -> Tensor:
        """`commit`, and the (dim, dim) float64 change that it makes to the Gram matrix. Collective."""
        dim = self.rows.shape[1]
        change = self.rows.new_zeros(dim, dim, dtype=torch.float64)
        for places, values in self._pending:
            old, new = self.rows[places].double(), values.double()
            change += new.T @ new - old.T @ old
            self.rows[places] = values
        self._pending.clear()
        return all_sum(change)

    def moments(self, queries: Tensor, own: Tensor, temperature: float) -> Moments:
        """Of each query's logits to all rows but its own, over the bank of all workers, for this worker's queries. Collective."""
        everyone, places = gather(queries.detach()) / temperature, self._places(gather(own))
        total = Moments.none(everyone, everyone.shape[1])
        for start, rows in self._blocks(everyone.dtype):
            logits = everyone @ rows.T
            _hide(logits, places - start)
            total = total.plus(Moments.of(logits, rows))
        return total.over_workers().mine()

    def _nearest(self, queries: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(q, dim) rows of the bank, equal on all workers, and their (q,) ids -> (q,) nearest other ids, (q,) entropies. Collective."""
        places, total = self._places(own), Moments.none(queries, 0)
        best, found = queries.new_full((len(queries),), 2 * HIDDEN), torch.full_like(own, self.size)
        for start, rows in self._blocks(queries.dtype):
            similarity = queries @ rows.T
            total = total.plus(
                Moments.of(similarity / temperature, rows[:, :0])
            )  # without rows: only the entropy is wanted
            _hide(similarity, places - start)
            value, column = similarity.max(
                1
            )  # the first of equal ones, and only a strictly nearer one later replaces it
            nearer = value > best
            best, found = (
                torch.where(nearer, value, best),
                torch.where(nearer, (start + column) * world() + rank(), found),
            )
        if world() > 1:
            nearest = best.clone()
            with part(COMMUNICATION):
                dist.all_reduce(nearest, dist.ReduceOp.MAX)
                found = torch.where(best == nearest, found, self.size)
                dist.all_reduce(found, dist.ReduceOp.MIN)
        return found, total.over_workers().entropy()

    def _places(self, ids: Tensor) -> Tensor:
        """(b,) ids -> their places in this worker's shard, -1 where another has them."""
        return torch.where(ids % world() == rank(), ids // world(), -1)

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """This worker's rows, `chunk` at a time, with the place of the first."""
        for start in range(0, len(self.rows), self.chunk):
            rows = self.rows[start : start + self.chunk]
            yield start, rows.to(torch.promote_types(rows.dtype, dtype))


def _hide(logits: Tensor, columns: Tensor) -> None:
    """Take column `columns[i]` out of row i of (b, k) logits, where it is one of them. Without indices of unknown number: a GPU need not wait."""
    last = logits.shape[1] - 1
    inside, column = ((columns >= 0) & (columns <= last))[:, None], columns.clamp(0, last)[:, None]
    logits.scatter_(1, column, torch.where(inside, HIDDEN, logits.gather(1, column)))


class _Others(torch.autograd.Function):
    """`MemoryBank.others`. Rows of the bank are constants, so the gradients are those of the queries alone, in closed form:

    d log Z / dv = E[m] / temperature,    dH / dv = -(E[logit m] - E[logit] E[m]) / temperature
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, bank: MemoryBank, own: Tensor, temperature: float, own_logit: float | None
    ) -> tuple[Tensor, Tensor]:
        others = bank.moments(queries, own, temperature)
        among = others
        if own_logit is not None:  # a row that carries weight and no direction
            constant = Moments.none(queries, queries.shape[1])
            weight = torch.zeros_like(constant.zeroth)
            weight[:, 0] = 1.0
            among = others.plus(Moments(torch.full_like(constant.peak, own_logit), weight, constant.first))
        ctx.save_for_backward(others.mean() / temperature, among.spread() / temperature)
        return others.log_partition(), among.entropy()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_partition: Tensor, by_entropy: Tensor) -> tuple[Tensor, None, None, None, None]:
        mean, spread = ctx.saved_tensors
        return by_partition[:, None] * mean - by_entropy[:, None] * spread, None, None, None, None

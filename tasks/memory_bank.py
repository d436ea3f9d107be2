"""A memory bank: the last embedding of every image, sharded over workers. A softmax over it contrasts all images.

Softmax over all n images (Wu et al. 2018; Super-AND, eq. 1) needs n logits per image, yet the log-partition, the
entropy and both gradients are moments of one weighted sum over the rows. The bank is therefore read once, `chunk` rows
at a time, and no (b, n) tensor ever exists. A worker sums over its own shard; the workers then exchange as much as the
batch is large, not the bank. Where n is too large even for that, the sums are estimated over some rows, drawn again at
each step, and the rows may be stored in 16 bits.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from firstlight.tasks.collective import COMMUNICATION, all_sum, gather_over_workers, rank, world_size
from firstlight.tasks.counter_rng import derive_keys, draw_uniform
from firstlight.tasks.device.timer import time_part
from firstlight.tasks.sample_table import TABLES, SampleTable
from firstlight.tasks.softmax_moments import HIDDEN_LOGIT, Moments

# The number of rows whose neighbours are searched at a time: a tile of 1024 x chunk logits is 32 MB.
NEIGHBOUR_QUERY_BLOCK = 1024
# The stream of the initial rows, which separates them from all other numbers drawn with this seed.
BANK_STREAM = 0x62616E6B
# The stream of the rows over which a softmax is estimated.
SAMPLE_STREAM = 0x73616D70


def draw_initial_rows(rows: Tensor, dim: int, seed: int) -> Tensor:
    """Draws (k, dim) embeddings of (k,) rows from U(-sqrt(3/d), sqrt(3/d)). Each is a function of (seed, row).

    Their length is 1 on average only, as in the authors' code.
    """
    parts = []
    for part in rows.split(8192):
        keys = derive_keys(seed, torch.zeros_like(part), part, BANK_STREAM)
        parts.append(draw_uniform(keys, dim))
    return (torch.cat(parts) * 2.0 - 1.0) * math.sqrt(3.0 / dim)


def draw_spread_rows(count: int, size: int, seed: int, step: int) -> np.ndarray:
    """Draws (count,) int64 rows of 0..size-1 in ascending order, one from each of `count` equally long intervals.

    Every row is expected count / size times, so a sum over the drawn rows times size / count estimates the sum over all
    rows without bias. A row that lies across two intervals may be drawn for both. The rows are a function of (seed,
    step): number k of a step is one of Philox (Salmon et al. 2011), whose counter begins at (0, step).
    """
    generator = np.random.Philox(key=[seed % 2**64, SAMPLE_STREAM], counter=[0, step, 0, 0])
    uniform = (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53
    return np.minimum((np.arange(count) + uniform) * (size / count), size - 1).astype(np.int64)


class MemoryBank(SampleTable):
    """A table of `size` embeddings of size `dim`.

    Queries are (b, dim). Everything is computed in the wider type of query and row.

    Args:
        dtype: the type in which the embeddings are stored.
    """

    def __init__(self, size: int, dim: int, seed: int, chunk: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(size, (dim,), dtype, lambda rows: draw_initial_rows(rows, dim, seed))
        self.chunk = chunk

    @time_part(TABLES)
    def contrast_others(
        self,
        queries: Tensor,
        own: Tensor,
        temperature: float,
        own_class: float | Tensor | None = None,
        sample: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Contrasts (b, dim) queries v of this worker with all rows of the bank but their own. It is collective.

        Args:
            own: (b,) rows of the queries' own images.
            own_class: the own row's part in the entropy. None leaves it out, a number replaces its logit, and its
                (b, dim) embeddings in the bank include it as they do all other rows.
            sample: (k,) int64 rows, equal on all workers, as `draw_spread_rows` draws them: the sums over the
                rows of the bank are estimated by those over the sample, times size / k. None: they are exact.

        Returns:
            (b,) log sum over j != own of exp(m_j.v / temperature), and the (b,) entropy of the softmax over j.
        """
        found: tuple[Tensor, Tensor] = _ContrastOthers.apply(  # type: ignore[no-untyped-call]
            queries, self, own, temperature, own_class, sample
        )
        return found

    @torch.no_grad()
    @time_part(TABLES)
    def find_neighbours(self, temperature: float, features: SampleTable | None = None) -> tuple[Tensor, Tensor]:
        """Finds the nearest other image of every image, and the entropy of its softmax. It is exact and collective.

        Args:
            features: a table of (size, dim) embeddings f(x) of the images. None: the rows of the bank stand for them.

        Returns:
            On every worker: (size,) other images with the nearest f(x) (Super-AND, eq. 7; the lowest of equally near
            ones), and (size,) entropies of the softmax of f(x) over all rows of the bank, the own one included (eqs. 1
            and 9).
        """
        embeddings = (self if features is None else features).values
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        nearest = torch.empty(self.size, dtype=torch.int64, device=self.values.device)
        entropy = self.values.new_empty(self.size, dtype=wide)
        for holder in range(world_size()):
            held = torch.arange(holder, self.size, world_size(), device=self.values.device)
            for start in range(0, len(held), NEIGHBOUR_QUERY_BLOCK):
                rows = held[start : start + NEIGHBOUR_QUERY_BLOCK]
                queries = (
                    embeddings[start : start + NEIGHBOUR_QUERY_BLOCK].to(wide, copy=True)
                    if rank() == holder
                    else embeddings.new_empty(len(rows), *embeddings.shape[1:], dtype=wide)
                )
                if world_size() > 1:
                    with time_part(COMMUNICATION):
                        dist.broadcast(queries, src=holder)
                nearest[rows], entropy[rows] = self._find_nearest(queries, rows, temperature, embeddings)
        return nearest, entropy

    @torch.no_grad()
    @time_part(TABLES)
    def gram_matrix(self) -> Tensor:
        """Returns the (dim, dim) float64 Gram matrix M^T M, the same on every worker. It is collective."""
        dim = self.values.shape[1]
        total = self.values.new_zeros(dim, dim, dtype=torch.float64)
        for _, rows in self._iterate_blocks(torch.float64):
            total += rows.T @ rows
        return all_sum(total)

    @torch.no_grad()
    @time_part(TABLES)
    def commit_gram_change(self) -> Tensor:
        """Commits the writes. Returns the (dim, dim) float64 change of the Gram matrix. It is collective."""
        dim = self.values.shape[1]
        change = self.values.new_zeros(dim, dim, dtype=torch.float64)
        for positions, values in self._take_pending():
            old, new = self._stored[positions].double(), values.double()
            if world_size() > 1:
                # All rows of the batch are here, and those of other workers count as zeros.
                own = (positions < len(self.values))[:, None]
                old, new = torch.where(own, old, 0.0), torch.where(own, new, 0.0)
            change += new.T @ new - old.T @ old
            self._stored[positions] = values
        return all_sum(change)

    def compute_moments(
        self, queries: Tensor, own: Tensor, temperature: float, sample: np.ndarray | None = None
    ) -> Moments:
        """Returns the moments of this worker's queries over all rows of the bank but their own. It is collective.

        `sample`: the rows over which they are estimated; see `contrast_others`.
        """
        everyone = gather_over_workers(queries.detach()) / temperature
        positions = self._local_positions(gather_over_workers(own))
        if sample is not None:
            total = self._sum_sampled_moments(everyone, positions, sample).sum_over_workers()
            return total.scale_weights(self.size / len(sample)).select_own_queries()
        total = Moments.without_rows(everyone, everyone.shape[1])
        for start, rows in self._iterate_blocks(everyone.dtype):
            logits = everyone @ rows.T
            _hide_columns(logits, positions - start)
            total = total.add_moments(Moments.from_logits(logits, rows))
        return total.sum_over_workers().select_own_queries()

    def _sum_sampled_moments(self, logit_queries: Tensor, positions: Tensor, sample: np.ndarray) -> Moments:
        """Returns the moments over those of the (k,) sampled rows that are in this worker's shard.

        Args:
            logit_queries: (b, dim) queries of all workers, divided by the temperature.
            positions: (b,) positions of the queries' own rows in this shard; -1 for rows of another worker.
            sample: the rows. They are on the host, where the number of those in this shard is known without a wait.
        """
        total = Moments.without_rows(logit_queries, logit_queries.shape[1])
        here = torch.from_numpy(sample[sample % world_size() == rank()] // world_size())
        dtype = torch.promote_types(self.values.dtype, logit_queries.dtype)
        for part in here.to(self.values.device, non_blocking=True).split(self.chunk) if len(here) else ():
            rows = self.values[part].to(dtype)
            logits = logit_queries @ rows.T
            logits.masked_fill_(positions[:, None] == part, HIDDEN_LOGIT)
            total = total.add_moments(Moments.from_logits(logits, rows))
        return total

    def _find_nearest(
        self, queries: Tensor, own: Tensor, temperature: float, embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the (q,) nearest other images and the (q,) entropies of images. It is collective.

        Args:
            queries: (q, dim) embeddings of the images, equal on all workers.
            own: (q,) rows of these images.
            embeddings: (k, dim) embeddings of the images of this worker's shard.
        """
        positions, total = self._local_positions(own), Moments.without_rows(queries, 0)
        best, found = queries.new_full((len(queries),), 2 * HIDDEN_LOGIT), torch.full_like(own, self.size)
        for start, rows in self._iterate_blocks(queries.dtype):
            similarity = queries @ rows.T
            # The moments are those of rows of size 0: only the entropy is needed.
            total = total.add_moments(Moments.from_logits(similarity / temperature, rows[:, :0]))
            if embeddings is not self.values:
                similarity = queries @ embeddings[start : start + self.chunk].T
            _hide_columns(similarity, positions - start)
            # `max` takes the first of equal values, and only a strictly nearer row replaces it later.
            value, column = similarity.max(1)
            nearer = value > best
            best = torch.where(nearer, value, best)
            found = torch.where(nearer, (start + column) * world_size() + rank(), found)
        if world_size() > 1:
            nearest = best.clone()
            with time_part(COMMUNICATION):
                dist.all_reduce(nearest, dist.ReduceOp.MAX)
                found = torch.where(best == nearest, found, self.size)
                dist.all_reduce(found, dist.ReduceOp.MIN)
        return found, total.sum_over_workers().entropy()

    def _local_positions(self, rows: Tensor) -> Tensor:
        """Returns the (b,) positions of rows in this worker's shard, -1 for rows of another worker."""
        return torch.where(rows % world_size() == rank(), rows // world_size(), -1)

    def _iterate_blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yields this worker's embeddings, `chunk` at a time, with the position of the first."""
        for start in range(0, len(self.values), self.chunk):
            rows = self.values[start : start + self.chunk]
            yield start, rows.to(torch.promote_types(rows.dtype, dtype))


def _hide_columns(logits: Tensor, columns: Tensor) -> None:
    """Gives column `columns[i]` of row i of (b, k) logits no weight, if it is one of them.

    It uses no indices of unknown number, so a GPU need not wait.
    """
    last = logits.shape[1] - 1
    inside, column = ((columns >= 0) & (columns <= last))[:, None], columns.clamp(0, last)[:, None]
    logits.scatter_(1, column, torch.where(inside, HIDDEN_LOGIT, logits.gather(1, column)))


class _ContrastOthers(torch.autograd.Function):
    """Implements `MemoryBank.contrast_others`. Rows of the bank are constants, so only the queries have gradients:

    d log Z / dv = E[m] / temperature,    dH / dv = -(E[logit m] - E[logit] E[m]) / temperature
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        bank: MemoryBank,
        own: Tensor,
        temperature: float,
        own_class: float | Tensor | None,
        sample: np.ndarray | None,
    ) -> tuple[Tensor, Tensor]:
        others = bank.compute_moments(queries, own, temperature, sample)
        among = others
        if isinstance(own_class, Tensor):
            logit = (queries * own_class).sum(1, keepdim=True) / temperature
            among = others.add_moments(Moments.from_row(logit, own_class.to(logit.dtype)))
        # A constant logit carries weight and no direction.
        elif own_class is not None:
            among = others.add_moments(
                Moments.from_row(torch.full_like(others.peak, own_class), torch.zeros_like(queries))
            )
        ctx.save_for_backward(others.mean_row() / temperature, among.logit_covariance() / temperature)
        return others.log_partition(), among.entropy()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_partition: Tensor, by_entropy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        mean, spread = ctx.saved_tensors
        return by_partition[:, None] * mean - by_entropy[:, None] * spread, None, None, None, None, None

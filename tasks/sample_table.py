"""State per image, keyed by image id and sharded over workers: targets, memory banks, neighbourhoods.

The row of id i lives on rank i % world. A table is not a buffer of the module: DistributedDataParallel would broadcast rank 0's shard over
every other. Writes wait for `commit`, after the optimiser's step, so that a step always reads the table as it was before the step (and
autograd never sees a row change under it).
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from firstlight.tasks.collective import COMMUNICATION, gather, rank, world
from firstlight.tasks.timer import part

TABLES = "tables"  # what reading and writing them is called, by the clock
Rows = Callable[[Tensor], Tensor]  # ids (k,) int64 -> rows (k, *shape)


class SampleTable:
    """`size` rows of `shape` and `dtype`. `init(ids)` gives the first rows; it must not depend on which ids are asked together."""

    def __init__(self, size: int, shape: tuple[int, ...], dtype: torch.dtype, init: Rows) -> None:
        self.size = size
        self.ids = torch.arange(rank(), size, world())  # a slice of all ids would keep all of them in memory
        self.rows = init(self.ids).to(dtype)
        assert self.rows.shape == (len(self.ids), *shape)
        self._pending: list[tuple[Tensor, Tensor]] = []

    @part(TABLES)
    def read(self, ids: Tensor) -> Tensor:
        """(B,) ids of this rank -> their (B, *shape) rows. Collective: every rank calls it, with equally many ids."""
        everyone = self._checked(gather(ids))
        if world() == 1:
            return self.rows[everyone]
        rows = self.rows.new_zeros((len(everyone), *self.rows.shape[1:]))
        if len(
            self.rows
        ):  # every row has one owner: the others add zeros. Without a mask of flexible length, which a GPU would be waited for
            here = (everyone % world() == rank()).view(-1, *[1] * (self.rows.dim() - 1))
            rows = torch.where(here, self.rows[(everyone // world()).clamp_max(len(self.rows) - 1)], rows)
        with part(COMMUNICATION):
            dist.all_reduce(rows)
        size = len(ids)
        return rows[rank() * size : (rank() + 1) * size]

    @part(TABLES)
    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Hold back (B, *shape) rows for `commit`. Collective. No id may stand twice in the global batch: which row wins would be chance.

        Raises:
            ValueError: a repeated id (looked for on the CPU only, as all checks of ids).
        """
        everyone, values = self._checked(gather(ids)), gather(rows.detach().to(self.rows.dtype))
        if everyone.device.type == "cpu":
            unique, counts = everyone.unique(return_counts=True)
            if len(unique) < len(everyone):
                raise ValueError(f"a table was written twice in one step for the ids {unique[counts > 1].tolist()[:5]}")
        if world() > 1:
            here = everyone % world() == rank()
            everyone, values = everyone[here], values[here]
        self._pending.append((everyone // world(), values))

    @part(TABLES)
    def commit(self) -> None:
        """Make the writes since the last commit visible to `read`."""
        for places, values in self._pending:
            self.rows[places] = values
        self._pending.clear()

    def to(self, device: torch.device) -> "SampleTable":
        self.rows, self.ids = self.rows.to(device), self.ids.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's shard: `ids` (k,) and `rows` (k, *shape). Nothing may be pending."""
        assert not self._pending
        return {"ids": self.ids.cpu(), "rows": self.rows.cpu()}

    def load_state_dicts(self, shards: Sequence[dict[str, Tensor]]) -> None:
        """Take this rank's rows from the shards of any number of workers.

        Raises:
            ValueError: the shards together do not hold every id of this table exactly once, or rows of another shape.
        """
        ids, rows = torch.cat([s["ids"] for s in shards]), torch.cat([s["rows"] for s in shards])
        if len(ids) != self.size or not torch.equal(ids.sort().values, torch.arange(self.size)):
            raise ValueError(
                f"the {len(shards)} shards hold {len(ids.unique())} of the table's {self.size} rows: a shard is missing or foreign"
            )
        if rows.shape[1:] != self.rows.shape[1:] or rows.dtype != self.rows.dtype:
            raise ValueError(
                f"rows of {tuple(rows.shape[1:])} {rows.dtype} do not fit a table of {tuple(self.rows.shape[1:])} {self.rows.dtype}"
            )
        order = torch.empty_like(ids)
        order[ids] = torch.arange(self.size)
        self.rows = rows[order[self.ids.cpu()]].to(self.rows.device)

    def _checked(self, ids: Tensor) -> Tensor:
        """`ids`; looked at on the CPU only. A GPU would have to be waited for at every step: there, the loop has checked them on the host
        (`job.to_batch`), and what still is outside ends in CUDA's own assertion."""
        if ids.device.type != "cpu":
            return ids
        wrong = ids[(ids < 0) | (ids >= self.size)]
        if len(wrong):
            raise IndexError(f"id {int(wrong[0])} is outside of the table's 0..{self.size - 1}")
        return ids

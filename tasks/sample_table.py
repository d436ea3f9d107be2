"""State per image, keyed by row and sharded over workers: targets, memory banks, neighbourhoods.

The row of an image is its position 0..size-1 among the images trained on (`Batch.rows`), not its id in the store. Rank
r holds the rows r, r + world, r + 2 world ... A table is not a buffer of the module: DistributedDataParallel would
broadcast rank 0's shard over every other. Writes wait for `commit`, after the optimiser's step, so a step always reads
the table as it was before the step, and autograd never sees a value change.

Nothing here needs a value on the host. Where ids are made, on the host, the training loop checks the rows of a batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from firstlight.tasks.collective import COMMUNICATION, gather_over_workers, rank, select_own_rows, world_size
from firstlight.tasks.device.timer import time_part

# The name under which the step timer counts reading and writing.
TABLES = "tables"
# (k,) int64 rows -> (k, *shape) values.
InitialValues = Callable[[Tensor], Tensor]


class SampleTable:
    """A value of `shape` and `dtype` for each of the rows 0..size-1.

    Args:
        init: returns the initial values of rows; they must not depend on which rows are asked together.
    """

    def __init__(self, size: int, shape: tuple[int, ...], dtype: torch.dtype, init: InitialValues) -> None:
        self.size = size
        # The range has memory of its own: a slice of all rows would keep all of them.
        self.own_rows = torch.arange(min(rank(), size), size, world_size())
        self.values = init(self.own_rows).to(dtype)
        assert self.values.shape == (len(self.own_rows), *shape)
        self._pending: list[tuple[Tensor, Tensor]] = []
        # () bool on the table's device: where it is false, `commit` changes nothing. None: it always writes.
        self.gate: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The (k, *shape) values of this rank's rows. It may be changed in place."""
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        # Each of several workers has a row more, behind its own, which takes what is written to rows of others: to
        # select the own ones of a batch, a GPU would have to wait for their number.
        self._stored = torch.cat((values, values.new_zeros(1, *values.shape[1:]))) if world_size() > 1 else values
        self._values = self._stored[: len(values)] if world_size() > 1 else values

    @time_part(TABLES)
    def read(self, rows: Tensor) -> Tensor:
        """Returns the (B, *shape) values of (B,) rows. Collective: every rank calls it, with equally many rows.

        Raises:
            IndexError: a row outside of 0..size-1 (on the CPU only).
        """
        everyone = self._check_rows(gather_over_workers(rows))
        if world_size() == 1:
            return self.values[everyone]
        values = self.values.new_zeros((len(everyone), *self.values.shape[1:]))
        # Every row has one owner, and the other ranks add zeros. A mask of flexible length would make a GPU wait.
        if len(self.values):
            here = (everyone % world_size() == rank()).view(-1, *[1] * (self.values.dim() - 1))
            values = torch.where(here, self.values[(everyone // world_size()).clamp_max(len(self.values) - 1)], values)
        with time_part(COMMUNICATION):
            dist.all_reduce(values)
        return select_own_rows(values)

    @torch.no_grad()
    def gather_values(self) -> Tensor:
        """Returns the (size, *shape) values of all workers by row, on every worker. It is collective."""
        if world_size() == 1:
            return self.values.clone()
        longest = -(-self.size // world_size())
        padded = self.values.new_zeros(longest, *self.values.shape[1:])
        padded[: len(self.values)] = self.values
        shards: Tensor = gather_over_workers(padded).unflatten(0, (world_size(), longest))
        return shards.transpose(0, 1).flatten(0, 1)[: self.size]

    @time_part(TABLES)
    def write(self, rows: Tensor, values: Tensor) -> None:
        """Keeps (B, *shape) values of (B,) rows for `commit`. It is collective.

        No row may occur twice in the global batch: it would be chance which value stays.

        Raises:
            IndexError: a row outside of 0..size-1 (on the CPU only).
            ValueError: a repeated row (on the CPU only).
        """
        everyone = self._check_rows(gather_over_workers(rows))
        values = gather_over_workers(values.detach().to(self.values.dtype))
        if everyone.device.type == "cpu":
            ordered = everyone.sort().values
            again = ordered[1:] == ordered[:-1]
            if not _holds_on_host(~again.any()):
                repeated = ordered[1:][again].unique().tolist()[:5]
                raise ValueError(f"a table was written twice in one step for the rows {repeated}")
        positions = everyone // world_size()
        if world_size() > 1:
            positions = torch.where(everyone % world_size() == rank(), positions, len(self.values))
        self._pending.append((positions, values))

    @time_part(TABLES)
    def commit(self) -> None:
        """Makes the writes since the last commit visible to `read`."""
        for positions, values in self._take_pending():
            self._stored[positions] = values

    def discard(self) -> None:
        """Drops the writes since the last commit."""
        self._pending.clear()

    def _take_pending(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the (k,) positions and the (k, *shape) values to write there, and forgets them."""
        found = [
            (positions, values if self.gate is None else torch.where(self.gate, values, self._stored[positions]))
            for positions, values in self._pending
        ]
        self._pending.clear()
        return found

    def to(self, device: torch.device) -> "SampleTable":
        """Moves the table to `device`. Returns the table itself."""
        self.values, self.own_rows = self.values.to(device), self.own_rows.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Returns this rank's shard: its (k,) rows as "ids", their (k, *shape) values as "rows".

        The names are those of the checkpoint's files. No write may be pending.
        """
        assert not self._pending
        return {"ids": self.own_rows.cpu(), "rows": self.values.cpu()}

    def load_state_dicts(self, shards: Sequence[dict[str, Tensor]]) -> None:
        """Loads this rank's values from the shards of any number of workers.

        Raises:
            ValueError: the shards together do not hold every row of this table exactly once, or values of another
                shape or type.
        """
        rows, values = torch.cat([s["ids"] for s in shards]), torch.cat([s["rows"] for s in shards])
        if len(rows) != self.size or not torch.equal(rows.sort().values, torch.arange(self.size)):
            raise ValueError(
                f"the {len(shards)} shards hold {len(rows.unique())} of the table's {self.size} rows: "
                "a shard is missing or foreign"
            )
        if values.shape[1:] != self.values.shape[1:] or values.dtype != self.values.dtype:
            raise ValueError(
                f"values of shape {tuple(values.shape[1:])} and type {values.dtype} do not fit a table of "
                f"shape {tuple(self.values.shape[1:])} and type {self.values.dtype}"
            )
        order = torch.empty_like(rows)
        order[rows] = torch.arange(self.size)
        self.values = values[order[self.own_rows.cpu()]].to(self.values.device)

    def _check_rows(self, rows: Tensor) -> Tensor:
        """Returns `rows`. On the CPU, raises an IndexError if one is outside of 0..size-1.

        On a GPU the check would wait for the device at every step. There the training loop has checked the rows on the
        host, and a row that still is outside ends in CUDA's own assertion.
        """
        if rows.device.type != "cpu":
            return rows
        inside = (rows >= 0) & (rows < self.size)
        if not _holds_on_host(inside.all()):
            raise IndexError(f"row {int(rows[~inside][0])} is outside of the table's rows 0..{self.size - 1}")
        return rows


def _holds_on_host(fact: Tensor) -> bool:
    """Returns the () bool `fact`, which is in the host's memory, by torch's own assertion."""
    try:
        torch._assert_async(fact)
    except RuntimeError:
        return False
    return True

"""What a training holds: the tables of the methods, sharded over the workers, and what every worker has of all images."""

from dataclasses import dataclass

from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import ROW_GROUP
from firstlight.tasks.pretrain.method import Method
from firstlight.tasks.sample_table import SampleTable

EPOCHS_KEPT = 4  # of a plan, by each process that asks for them (`plan._epoch`)
ID = 8  # bytes


def tables(method: Method) -> dict[str, SampleTable]:
    """Those of a method, by name: also those that no checkpoint has."""
    return {**{name: value for name, value in vars(method).items() if isinstance(value, SampleTable)}, **method.tables}


@dataclass(frozen=True)
class Rows:
    """A table: bytes of a row and of the id that is kept with it."""

    name: str
    row: int
    id: int

    def held(self, size: int, rank: int, world: int) -> int:
        """Bytes on `rank` of a table of `size` rows."""
        return len(range(rank, size, world)) * (self.row + self.id)


def rows(method: Method) -> list[Rows]:
    found = {id(table): (name, table) for name, table in tables(method).items()}
    return [Rows(name, table.rows[:1].nbytes, table.ids[:1].nbytes) for name, table in found.values()]


def of_plan(size: int) -> dict[str, int]:
    """Bytes that every process has of the order of `size` images, however many workers there are."""
    return {
        "ids": ID * size,
        "row groups": ID * -(-size // ROW_GROUP),
        f"{EPOCHS_KEPT} epochs": EPOCHS_KEPT * ID * size,
    }


def held_by_plan(plan: BatchPlan) -> dict[str, int]:
    """The same, of one that there is."""
    return {
        "ids": plan.ids.nbytes,
        "row groups": plan.group_starts.nbytes,
        f"{EPOCHS_KEPT} epochs": EPOCHS_KEPT * plan.epoch(0).nbytes,
    }

"""The memory of a training: the tables of the methods, sharded over the workers, and the order of all images."""

from dataclasses import dataclass

from firstlight.pipeline.data.manifest import ROWS_PER_GROUP
from firstlight.pipeline.data.order.id_set import BITS_PER_COUNT
from firstlight.pipeline.data.order.lane_plan import LanePlan, _order_groups
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.tasks.pretrain.method import Method
from firstlight.tasks.sample_table import SampleTable

# Epochs of a plan that each process keeps (`plan._shuffle_epoch`)
CACHED_EPOCHS = 4
# Epochs of a plan of lanes, whose row groups each process keeps (`lane_plan._order_groups`)
CACHED_GROUP_ORDERS = 2
ID_BYTES, GROUP_BYTES = 8, 4


def find_tables(method: Method) -> dict[str, SampleTable]:
    """Returns the tables of a method by name, including those that no checkpoint has."""
    return {**{name: value for name, value in vars(method).items() if isinstance(value, SampleTable)}, **method.tables}


@dataclass(frozen=True)
class TableSize:
    """The size of a table: bytes of a row, and of the id that is kept with it."""

    name: str
    row_bytes: int
    id_bytes: int

    def count_bytes(self, size: int, rank: int, world: int) -> int:
        """Returns the bytes on `rank` of a table of `size` rows.

        Each of several workers has a row more, for what is written to rows of others.
        """
        return len(range(rank, size, world)) * (self.row_bytes + self.id_bytes) + (world > 1) * self.row_bytes


def measure_tables(method: Method) -> list[TableSize]:
    """Returns the sizes of all tables of a method."""
    found = {id(table): (name, table) for name, table in find_tables(method).items()}
    return [TableSize(name, table.values[:1].nbytes, table.own_rows[:1].nbytes) for name, table in found.values()]


def estimate_plan_bytes(size: int) -> dict[str, int]:
    """Returns the bytes of the order of `size` images in every process, for any number of workers."""
    return {
        "ids": ID_BYTES * size,
        "row groups": ID_BYTES * -(-size // ROWS_PER_GROUP),
        f"{CACHED_EPOCHS} epochs": CACHED_EPOCHS * ID_BYTES * size,
    }


def measure_plan_bytes(plan: BatchPlan) -> dict[str, int]:
    """Returns the bytes of an existing plan, by the names of `estimate_plan_bytes`."""
    return {
        "ids": plan.ids.nbytes,
        "row groups": plan.group_starts.nbytes,
        f"{CACHED_EPOCHS} epochs": CACHED_EPOCHS * plan.epoch(0).nbytes,
    }


def estimate_lane_plan_bytes(size: int, held_out: bool) -> dict[str, int]:
    """Returns the same for a plan of lanes. `held_out`: images in between are not trained on."""
    groups = -(-size // ROWS_PER_GROUP)
    rows = -(-size // BITS_PER_COUNT)
    # The ids of a plan without held-out images are the first id and the positions of one run.
    ids = rows * BITS_PER_COUNT // 8 + (rows + 1) * ID_BYTES if held_out else 3 * ID_BYTES
    return {
        "ids": ids,
        "row groups": ID_BYTES * groups + ID_BYTES * (groups + 1),
        f"{CACHED_GROUP_ORDERS} epochs": CACHED_GROUP_ORDERS * (GROUP_BYTES + ID_BYTES) * groups,
    }


def measure_lane_plan_bytes(plan: LanePlan) -> dict[str, int]:
    """Returns the bytes of an existing plan of lanes, by the names of `estimate_lane_plan_bytes`."""
    order = _order_groups(plan, 0)
    return {
        "ids": plan.id_set.nbytes,
        "row groups": plan.group_starts.nbytes + plan.group_bounds.nbytes,
        f"{CACHED_GROUP_ORDERS} epochs": CACHED_GROUP_ORDERS * (order.groups.nbytes + order.ends.nbytes),
    }

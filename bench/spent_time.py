"""The time that work takes: the seconds of a clock, and the CPU seconds of a process and of those that it starts."""

import time
from typing import NamedTuple, Self

import psutil


class SpentTime(NamedTuple):
    """The seconds of a clock, and the CPU seconds of a process and of all that it has started."""

    wall_s: float
    cpu_s: float

    @classmethod
    def read(cls, pid: int | None = None) -> Self:
        """Returns the present moment of a process, of this one if `pid` is None."""
        return cls(time.perf_counter(), _read_tree_seconds(pid))

    def since(self, before: Self) -> Self:
        """Returns the time from the moment `before` to this one."""
        return type(self)(self.wall_s - before.wall_s, self.cpu_s - before.cpu_s)


def _read_tree_seconds(pid: int | None) -> float:
    root = psutil.Process(pid)
    times = root.cpu_times()
    total = float(times.user + times.system + times.children_user + times.children_system)
    for process in root.children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total

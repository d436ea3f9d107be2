"""The CPUs that a process may use: those of the machine, less what its container or its starter leaves it."""

import os
from pathlib import Path

# The time of CPUs that a container has in each period, in microseconds: "400000 100000", or "max 100000" without a
# limit (the kernel's cgroup-v2, cpu.max).
CPU_LIMIT_FILE = Path("/sys/fs/cgroup/cpu.max")

# The most images that are decoded at a time for a network.
MOST_DECODERS = 16
# The threads of a network on CPUs that one decoding thread feeds: measured, it feeds five of ResNet-18 with SimCLR's
# augmentations at 224 pixels, and more of most others.
THREADS_PER_DECODER = 4


def count_usable_cpus() -> int:
    """Returns the number of CPUs that this process may use, 1 at least; of a part of a CPU a whole one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_LIMIT_FILE.read_text().split()
        return min(cpus, max(-(-int(quota) // int(period)), 1))
    # There is no limit, or this is no container.
    except (OSError, ValueError):
        return cpus


def count_decoders(cpus: float) -> int:
    """Returns how many images are decoded at a time for a network on a GPU that has `cpus` CPUs; one is its own."""
    return _bound_decoders(int(cpus) - 1)


def count_decoders_beside(threads: int) -> int:
    """Returns how many images are decoded at a time beside a network that computes with `threads` threads on CPUs."""
    return _bound_decoders(threads // THREADS_PER_DECODER)


def _bound_decoders(count: int) -> int:
    return min(max(count, 1), MOST_DECODERS)

"""The CPU of a process that computes with torch: its threads, and memory that it does not give back between two steps.

By default the C library asks the system for the memory of every large tensor and returns it when the tensor is freed.
The system clears each page before it hands it out again, which can take longer than the computation: a forward pass of
EfficientNet-Lite0 on 256 images took three times as long here, a step of a small network 1.3 times.
"""

import ctypes
import os
from functools import cache

import torch

# Parameters of mallopt (glibc's malloc.h): the most bytes that stay unused at the end of the heap, and the most blocks
# that are taken from the system one by one.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
KEPT_BYTES = 2**31 - 1
# The environment variables by which somebody has decided otherwise.
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def set_up_cpu(threads: int) -> None:
    """Gives torch this number of threads, and lets the process keep the memory that it frees."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def multiplies_bf16_tiles() -> bool:
    """Returns True if this CPU multiplies tiles of bfloat16 matrices (AMX).

    It then computes most networks twice as fast in bfloat16 as in single precision, and in it other CPUs are slower.
    """
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@cache
def keep_freed_memory() -> bool:
    """Lets this process keep up to KEPT_BYTES that it has freed for what it computes next; returns False where the C
    library cannot, or where the environment states how it is to allocate.

    No number changes by it. The process may hold half as much again as it uses at its peak.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    return set_option is not None and bool(set_option(MMAP_MAX, 0)) and bool(set_option(TRIM_THRESHOLD, KEPT_BYTES))

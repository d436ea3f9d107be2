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


def multiplies_bf16_faster() -> bool:
    """Returns True if this CPU multiplies matrices of bfloat16 faster than those of single precision.

    It does so in tiles (AMX), and AMD's does in vectors (AVX512_BF16), of which it multiplies twice as many numbers at
    a time. Most networks are then computed 1.5 to 2 times as fast. The vectors of Intel's CPUs multiply as many of
    either format, and converting them takes time: networks are slower there, as on CPUs that have neither.
    """
    # Older versions of torch do not tell.
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    in_vectors = found.get("avx512_bf16", False) and str(found.get("cpu_name", "")).startswith("AMD")
    return bool(found.get("amx_bf16", False) or in_vectors)


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

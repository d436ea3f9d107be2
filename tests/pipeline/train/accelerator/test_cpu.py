"""Memory that a computation frees is used again, without new pages from the system."""

import os
import subprocess
import sys

import pytest
import torch

from firstlight.pipeline.train.accelerator import cpu

# 64 MB a tensor, above what the C library keeps by default.
COUNT_FAULTS = """
import resource, sys
import torch
from firstlight.pipeline.train.accelerator.cpu import set_up_cpu
if sys.argv[1] == "kept":
    set_up_cpu(1)
def compute():
    (torch.ones(2**24) + 1).sum()
# Until the heap has blocks of the right sizes.
for _ in range(10):
    compute()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(how: str, **environment: str) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    return int(subprocess.run(command, capture_output=True, check=True, env={**os.environ, **environment}).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is the GNU C library's")
def test_pages_of_freed_tensors_are_used_again() -> None:
    # Ten times two tensors of 64 MB, in pages of 4 kB or, if the system wants, of 2 MB.
    returned = count_faults("returned")
    assert count_faults("kept") < 0.2 * returned
    assert count_faults("kept", MALLOC_MMAP_THRESHOLD_="131072") > 0.5 * returned


def test_the_environment_decides_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.keep_freed_memory.cache_clear()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=4")
    assert not cpu.keep_freed_memory()
    cpu.keep_freed_memory.cache_clear()


def test_a_library_without_the_option_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.keep_freed_memory.cache_clear()
    for name in cpu.MALLOC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())
    assert not cpu.keep_freed_memory()
    cpu.keep_freed_memory.cache_clear()


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        cpu.set_up_cpu(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

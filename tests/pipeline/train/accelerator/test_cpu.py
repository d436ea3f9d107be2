"""Memory that a computation frees is used again, without new pages from the system."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from firstlight.pipeline.train.accelerator import cpu
from tests.support.clean_process import run_in_clean_process


def count_faults_here(how: str, output: Path) -> None:
    """Writes how many new pages ten computations take once the heap has blocks of the right sizes."""
    if how == "kept":
        cpu.set_up_cpu(1)
    before = 0
    for turn in range(20):
        if turn == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        # 64 MB a tensor, above what the C library keeps by default.
        (torch.ones(2**24) + 1).sum()
    output.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


def count_faults(output: Path, how: str, **environment: str) -> int:
    assert run_in_clean_process(count_faults_here, how, output, environment=environment) == 0
    return int(output.read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is the GNU C library's")
def test_pages_of_freed_tensors_are_used_again(tmp_path: Path) -> None:
    # Ten times two tensors of 64 MB, in pages of 4 kB or, if the system wants, of 2 MB.
    returned = count_faults(tmp_path / "returned", "returned")
    assert count_faults(tmp_path / "kept", "kept") < 0.2 * returned
    assert count_faults(tmp_path / "own", "kept", MALLOC_MMAP_THRESHOLD_="131072") > 0.5 * returned


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


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon 8488C"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon 8488C"}, False),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_bf16": True}, False),
        ({}, False),
    ],
)
def test_bf16_is_faster_in_tiles_and_in_the_vectors_of_amd(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool | str], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu.multiplies_bf16_faster() is expected


def test_an_older_torch_tells_nothing_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not cpu.multiplies_bf16_faster()

"""The number of CPUs of a process: its affinity, and the limit of its container."""

import os
from pathlib import Path

import pytest

from firstlight.pipeline import usable_cpus
from firstlight.pipeline.usable_cpus import count_decoders, count_decoders_beside, count_usable_cpus


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (None, 3),
        ("max 100000", 3),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("6400000 100000", 3),
        ("?", 3),
    ],
)
def test_cpus_are_those_of_the_process_and_of_its_container(
    text: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    monkeypatch.setattr(usable_cpus, "CPU_LIMIT_FILE", tmp_path / "cpu.max")
    if text is not None:
        (tmp_path / "cpu.max").write_text(text + "\n")
    assert count_usable_cpus() == count


@pytest.mark.parametrize(("cpus", "count"), [(0.5, 1), (1, 1), (2, 1), (7.9, 6), (17, 16), (64, 16)])
def test_images_are_decoded_by_all_cpus_but_one_up_to_sixteen(cpus: float, count: int) -> None:
    assert count_decoders(cpus) == count


@pytest.mark.parametrize(("threads", "count"), [(1, 1), (7, 1), (8, 2), (60, 15), (128, 16)])
def test_one_thread_decodes_for_four_of_a_network_on_cpus(threads: int, count: int) -> None:
    assert count_decoders_beside(threads) == count

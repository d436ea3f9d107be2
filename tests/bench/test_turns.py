"""Arms that take turns: they stand still while others work, and what they did in their turns is counted."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from bench.turns import StepCounter, measure_in_turns

LATE_S = 30.0


def count_with_a_child(folder: Path, name: str, pause_s: float, count_step: StepCounter) -> None:
    """Takes steps beside a busy child, and writes the ids of both processes and the threads of torch."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    (folder / name).write_text(f"{os.getpid()} {child.pid} {torch.get_num_threads()}")
    for step in itertools.count(1):
        time.sleep(pause_s)
        count_step(step)


def end_after(steps: int, count_step: StepCounter) -> None:
    for step in range(1, steps + 1):
        count_step(step)


def test_arms_stand_still_but_in_their_turns_and_end_with_their_children(tmp_path: Path) -> None:
    found = measure_in_turns(
        {
            "quick": (count_with_a_child, tmp_path, "quick", 0.01),
            "slow": (count_with_a_child, tmp_path, "slow", 0.1),
        },
        warmup=2,
        turn_s=0.6,
        rounds=2,
    )
    assert found["quick"].steps > found["slow"].steps >= 2
    for arm in found.values():
        assert 1.2 <= arm.wall_s < LATE_S
        # The child is busy while its arm has a turn: a second one of its own, and none of the other's.
        assert 0.1 < arm.cpu_s < 1.2 * arm.wall_s
    for name in found:
        *pids, threads = map(int, (tmp_path / name).read_text().split())
        assert threads == 1
        assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_an_arm_that_ends_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"^short: the process ended with 0$"):
        measure_in_turns({"short": (end_after, 3)}, warmup=5, turn_s=0.1, rounds=1)

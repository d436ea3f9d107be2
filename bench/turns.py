"""Arms of a comparison that take turns of seconds, so that each of them meets the machine at each of its speeds.

Each arm works without an end in a process of its own, which counts its steps. The process is stopped, with all those
that it has started, while others have their turns.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.spent_time import SpentTime
from firstlight.pipeline.child_module import end_with_parent

# Called by an arm after each step, with the number of steps that it has taken.
StepCounter = Callable[[int], None]
# The work of an arm: it is called with its arguments and a counter, and takes steps without an end.
ArmCall = tuple[Any, ...]

START_POLL_S = 0.05


@dataclass(frozen=True)
class TurnTotals:
    """The work of an arm in all its turns: steps, seconds, and the CPU seconds of all its processes."""

    steps: int
    wall_s: float
    cpu_s: float


def measure_in_turns(arms: Mapping[str, ArmCall], warmup: int, turn_s: float, rounds: int) -> dict[str, TurnTotals]:
    """Returns the totals of arms that had `rounds` turns of `turn_s` seconds each, after their first `warmup` steps.

    `arms`: name -> a function and its arguments; it is called with a `StepCounter` as the last argument.

    Raises:
        RuntimeError: an arm ended.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = {
            name: stack.enter_context(_start_arm(name, call, folder / str(number)))
            for number, (name, call) in enumerate(arms.items())
        }
        for arm in started.values():
            arm.reach(warmup)
        for _ in range(rounds):
            for arm in started.values():
                arm.take_turn(turn_s)
        return {name: arm.read_totals() for name, arm in started.items()}


class _RunningArm:
    """An arm in its process, which stands still but in its turns."""

    def __init__(self, name: str, process: Any, file: Path) -> None:
        self.name, self.process = name, process
        self.count = np.memmap(file, np.int64, "w+", shape=(1,))
        self.turns: list[SpentTime] = []
        self.first_step = 0

    def reach(self, step: int) -> None:
        """Lets the new process take its first steps, and stops it."""
        self.process.start()
        while self.count[0] < step:
            self._check_alive()
            time.sleep(START_POLL_S)
        self._signal(signal.SIGSTOP)
        self.first_step = int(self.count[0])

    def take_turn(self, seconds: float) -> None:
        begun = SpentTime.read(self.process.pid)
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        self.turns.append(SpentTime.read(self.process.pid).since(begun))
        self._check_alive()

    def read_totals(self) -> TurnTotals:
        wall_s, cpu_s = (sum(seconds) for seconds in zip(*self.turns, strict=True))
        return TurnTotals(int(self.count[0]) - self.first_step, wall_s, cpu_s)

    def _signal(self, number: int) -> None:
        # Its group has the processes that load images for it.
        os.killpg(self.process.pid, number)

    def _check_alive(self) -> None:
        if self.process.exitcode is not None:
            raise RuntimeError(f"{self.name}: the process ended with {self.process.exitcode}")

    def end(self) -> None:
        if self.process.pid is not None:
            # Its children outlive it for a moment, and may have ended before.
            with contextlib.suppress(ProcessLookupError):
                self._signal(signal.SIGKILL)
            # One that has only begun has no group yet.
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def _start_arm(name: str, call: ArmCall, file: Path) -> Iterator[_RunningArm]:
    work, *arguments = call
    process = multiprocessing.get_context("spawn").Process(target=_work_on, args=(file, work, *arguments))
    arm = _RunningArm(name, process, file)
    try:
        yield arm
    finally:
        arm.end()


def _work_on(file: Path, work: Callable[..., Any], *arguments: Any) -> None:
    os.setsid()
    end_with_parent()
    torch.set_num_threads(1)
    count = np.memmap(file, np.int64, "r+", shape=(1,))

    def count_step(step: int) -> None:
        count[0] = step

    work(*arguments, count_step)

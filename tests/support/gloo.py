"""A pool of processes joined by gloo, like training workers without Ray. Tests start it once per session."""

import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from tests.support.fork_server import get_fork_context

START_ATTEMPTS = 3
# Seconds.
START_TIMEOUT_S = 120.0


class Pool:
    """Processes that call functions together. `run(function, *args)` calls an importable function on every rank.

    The answers come in rank order.
    """

    def __init__(self, world: int) -> None:
        # Rarely, on a busy machine, gloo's first connection is closed at once.
        for _ in range(START_ATTEMPTS):
            self._start(world)
            if self._are_joined():
                return
            for process in self.processes:
                process.kill()
        raise AssertionError(f"{world} processes could not be joined")

    def _start(self, world: int) -> None:
        context = get_fork_context()
        store = tempfile.mktemp(prefix="gloo-")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world, store), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def _are_joined(self) -> bool:
        """Waits until all processes have joined; returns False as soon as one has ended instead."""
        waiting = [*self.pipes]
        while waiting:
            ready = wait(waiting, START_TIMEOUT_S)
            try:
                joined = [pipe for pipe in waiting if pipe in ready and pipe.recv()]
            except (EOFError, ConnectionResetError):
                return False
            if not joined:
                return False
            waiting = [pipe for pipe in waiting if pipe not in joined]
        return True

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self.pipes]
        for ok, value in answers:
            if not ok:
                raise AssertionError(value)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)


def _serve(pipe: Connection, rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    pipe.send(True)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()

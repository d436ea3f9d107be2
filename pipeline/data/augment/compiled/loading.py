"""Loads the compiled augmentations once a process has spent so much time on augmentations that this pays.

To load them takes half a second of a CPU and 55 MB. Where they were not compiled yet, another process does that
meanwhile (`kept_code`). Until they are there Pillow makes the views, or torch those of images that are held decoded,
with the same pixels.
"""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator

from firstlight.pipeline.child_module import end_processes, start_module
from firstlight.pipeline.data.augment.compiled.agreement import find_difference
from firstlight.pipeline.data.augment.compiled.kept_code import is_whole, load_machine_code, locate_machine_code
from firstlight.pipeline.data.augment.compiled.steps import MakeViews

# Seconds of a CPU that a process spends on augmentations before it loads the compiled ones.
PAYING_SECONDS = 1.0
COMPILING_MODULE = "firstlight.pipeline.data.augment.compiled.kept_code"


class CompiledOps:
    """The compiled augmentations of a process."""

    def __init__(self) -> None:
        self._make_views: MakeViews | None = None
        self._spent = 0.0
        self._compiler: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        # Why they cannot be used; empty if they can, or were not needed yet.
        self.obstacle = ""

    @contextlib.contextmanager
    def count_time(self) -> Iterator[None]:
        """Counts the time of the block, which makes views without them."""
        before = time.thread_time()
        yield
        self._spent += time.thread_time() - before

    def find(self) -> MakeViews | None:
        """Returns the function that makes views, or None as long as others make them. Threads may call it."""
        is_wanted = self._make_views is None and self._spent >= PAYING_SECONDS and not self.obstacle
        # One thread loads them, and the others go on meanwhile.
        if is_wanted and self._lock.acquire(blocking=False):
            try:
                self._take_step()
            finally:
                self._lock.release()
        return self._make_views

    def load(self) -> str:
        """Loads them now, compiled if need be. Returns why they cannot be used, empty if they can."""
        with self._lock:
            while self._make_views is None and not self.obstacle:
                self._take_step()
                if self._compiler is not None:
                    self._compiler.wait()
        return self.obstacle

    def _take_step(self) -> None:
        """Loads what is kept; otherwise has it compiled, or looks whether that has ended."""
        if self._compiler is not None and self._compiler.poll() is None:
            return
        try:
            folder = locate_machine_code()
            if is_whole(folder):
                self._use(load_machine_code(folder))
            elif self._compiler is None:
                self._compiler = start_module(COMPILING_MODULE)
                return
            else:
                self.obstacle = _read_problem(self._compiler)
        except Exception as error:
            # Others make the same views, whatever it was.
            self.obstacle = f"{type(error).__name__}: {error}"
        if self._compiler is not None:
            end_processes([self._compiler], [])
            self._compiler = None

    def _use(self, make_views: MakeViews) -> None:
        if difference := find_difference(make_views):
            self.obstacle = f"other pixels than Pillow's: {difference}"
        else:
            self._make_views = make_views


def _read_problem(compiler: subprocess.Popen[bytes]) -> str:
    """Returns what the process that compiled has said, or that it has ended."""
    assert compiler.stdout is not None
    try:
        return json.loads(compiler.stdout.readline())["problem"] or "the machine code is damaged"
    except (ValueError, KeyError):
        return f"the process that compiled has ended with {compiler.returncode}"


# The ones of this process.
compiled_ops = CompiledOps()

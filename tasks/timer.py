"""Where the time of a training goes: `with part("forward"): ...` adds to what the parts of a step have taken so far.

A part inside another counts for itself alone. On a GPU, whose work goes on while this process is ahead of it, events in its stream are the marks, and
nobody waits for them before `read`. Outside of `running`, and in any thread but its own, `part` does nothing.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import torch

Mark = float | torch.cuda.Event


class Stopwatch:
    """Seconds by part, each without the parts inside it."""

    def __init__(self) -> None:
        self._owner: int | None = None
        self._on_gpu = False
        self._clear()

    def _clear(self) -> None:
        self._open: list[str] = []  # the parts that have begun, the innermost last
        self._since: Mark = 0.0  # when the innermost began, or went on
        self._seconds: dict[str, float] = {}
        self._waiting: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # what a GPU is not asked for yet

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what this thread does on `device`."""
        self._clear()
        self._owner, self._on_gpu = threading.get_ident(), device.type == "cuda"
        mine = self._seconds
        try:
            yield
        finally:
            if self._seconds is mine:  # a training that failed may be ended only after the next has begun
                self._owner = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside for `name`."""
        if threading.get_ident() != self._owner:
            yield
            return
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call. On a GPU, waits until it has come to the end of the last part."""
        if self._waiting:
            torch.cuda.synchronize()
        for name, begin, end in self._waiting:
            self._add(name, begin.elapsed_time(end) / 1000)
        self._waiting.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _count(self) -> None:
        """What has passed is the innermost part's."""
        before, self._since = self._since, self._mark()
        if not self._open:
            return
        if isinstance(before, float) and isinstance(self._since, float):
            self._add(self._open[-1], self._since - before)
        elif not isinstance(before, float) and not isinstance(self._since, float):
            self._waiting.append((self._open[-1], before, self._since))

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


STOPWATCH = Stopwatch()  # of this process, which has one training at a time
part = STOPWATCH.part

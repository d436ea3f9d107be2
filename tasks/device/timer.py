"""A timer for the parts of a training step: `with time_part("forward"): ...` adds to the seconds of that part.

The time of a part inside another counts for the inner part alone. A GPU works while this process is ahead of it, so the
marks are events in its stream, and nothing waits for them before `read_seconds`. Outside of `time_thread`, and in any
thread but its own, `time_part` does nothing.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import torch

Mark = float | torch.cuda.Event


class StepTimer:
    """Counts seconds by part, each without the parts inside it."""

    def __init__(self) -> None:
        self._owner: int | None = None
        self._on_gpu = False
        self._reset_state()

    def _reset_state(self) -> None:
        # The parts that have begun, the innermost last.
        self._open: list[str] = []
        # The time at which the innermost part began or continued.
        self._since: Mark = 0.0
        self._seconds: dict[str, float] = {}
        # Intervals that the GPU has not been asked for yet.
        self._waiting: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def time_thread(self, device: torch.device) -> Iterator[None]:
        """Counts what this thread does on `device`."""
        self._reset_state()
        self._owner, self._on_gpu = threading.get_ident(), device.type == "cuda"
        seconds = self._seconds
        try:
            yield
        finally:
            # A training that failed may end only after the next one has begun.
            if self._seconds is seconds:
                self._owner = None

    @contextlib.contextmanager
    def time_part(self, name: str) -> Iterator[None]:
        """Counts the time inside for the part `name`."""
        if threading.get_ident() != self._owner:
            yield
            return
        self._count_elapsed()
        self._open.append(name)
        try:
            yield
        finally:
            self._count_elapsed()
            self._open.pop()

    def read_seconds(self) -> dict[str, float]:
        """Returns the seconds by part since the last call. On a GPU, waits for the end of the last part."""
        if self._waiting:
            torch.cuda.synchronize()
        for name, begin, end in self._waiting:
            self._add_seconds(name, begin.elapsed_time(end) / 1000)
        self._waiting.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _count_elapsed(self) -> None:
        """Adds the time since the last mark to the innermost part."""
        before, self._since = self._since, self._make_mark()
        if not self._open:
            return
        if isinstance(before, float) and isinstance(self._since, float):
            self._add_seconds(self._open[-1], self._since - before)
        elif not isinstance(before, float) and not isinstance(self._since, float):
            self._waiting.append((self._open[-1], before, self._since))

    def _add_seconds(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _make_mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


# The timer of this process, which runs one training at a time.
STEP_TIMER = StepTimer()
time_part = STEP_TIMER.time_part

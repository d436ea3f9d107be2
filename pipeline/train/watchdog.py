"""Watchdog for single-worker training: ends the process if no step completes within a timeout, so that Ray restarts it.

With several workers, the others notice a hang by their collective timeout. The timer is faulthandler's, a thread in C:
it also ends code that never releases the interpreter.
"""

import contextlib
import faulthandler
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# The file in the folder of an instance with the traceback of every thread, for each time that its process hung.
HANG_FILE = "hung.txt"
# Each start of the timer starts a thread, so quick steps do not all restart it.
REARM_S = 1.0


@dataclass
class _Timer:
    file: IO[bytes]
    seconds: float
    set_at: float | None = None


# The timer of this process: faulthandler has only one.
_timer: _Timer | None = None


@contextlib.contextmanager
def watch_process(folder: Path, seconds: float) -> Iterator[None]:
    """Ends this process with code 1 if, in the block, nothing of this module is called for `seconds` after a heartbeat.

    It may take up to one second longer.
    """
    global _timer
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / HANG_FILE, "ab") as file:
        _timer = _Timer(file, seconds)
        try:
            yield
        finally:
            suspend_timer()
            _timer = None


def send_heartbeat() -> None:
    """Restarts the timer after a completed step. Does nothing outside of `watch_process`."""
    if _timer is not None and (_timer.set_at is None or time.monotonic() - _timer.set_at > REARM_S):
        faulthandler.dump_traceback_later(_timer.seconds + REARM_S, exit=True, file=_timer.file)
        _timer.set_at = time.monotonic()


def suspend_timer() -> None:
    """Stops the timer until the next heartbeat, before work that may take long."""
    if _timer is not None:
        faulthandler.cancel_dump_traceback_later()
        _timer.set_at = None


def has_hung(folder: Path) -> bool:
    """Returns True if the work of this folder has hung since the last `delete_hang_record`."""
    file = folder / HANG_FILE
    return file.exists() and file.stat().st_size > 0


def delete_hang_record(folder: Path) -> None:
    (folder / HANG_FILE).unlink(missing_ok=True)

"""A worker that is alone has no other that would miss it: where it makes no step for long, a timer ends its process, and Ray starts it anew.

The timer is faulthandler's, which needs no turn of the interpreter: also code that never gives it back is ended.
"""

import contextlib
import faulthandler
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HANG_FILE = "hung.txt"  # in the folder of an instance: where its process was each time, a traceback of every thread
REARM_S = 1.0  # the timer is a thread: it is not started anew for each of many quick steps


@dataclass
class _Timer:
    file: IO[bytes]
    seconds: float
    set_at: float | None = None


_timer: _Timer | None = None  # of this process, as faulthandler has one


@contextlib.contextmanager
def watch_process(folder: Path, seconds: float) -> Iterator[None]:
    """Within it, this process ends with code 1 when `alive` was called, and then nothing of this module for `seconds` (a second more at the most)."""
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
    """A step was made. Outside of `watched`, nothing."""
    if _timer is not None and (_timer.set_at is None or time.monotonic() - _timer.set_at > REARM_S):
        faulthandler.dump_traceback_later(_timer.seconds + REARM_S, exit=True, file=_timer.file)
        _timer.set_at = time.monotonic()


def suspend_timer() -> None:
    """What comes now may take long: the timer waits for the next `alive`."""
    if _timer is not None:
        faulthandler.cancel_dump_traceback_later()
        _timer.set_at = None


def has_hung(folder: Path) -> bool:
    """Whether the work of this folder has hung, since `forget`."""
    file = folder / HANG_FILE
    return file.exists() and file.stat().st_size > 0


def delete_hang_record(folder: Path) -> None:
    (folder / HANG_FILE).unlink(missing_ok=True)

"""The life of a process that only runs a command: how often Python looks for garbage in it, and how it ends.

Imports of torch, MLflow and the rest leave 700,000 objects that stay until the end. Python's default looks through all
of them again and again while they are made, and frees them one by one at the end. In runs of 100 s that took 10 to 30.
"""

import atexit
import gc
import os
import sys
import threading
from typing import Any, NoReturn

# Numbers of new objects, of their collections, and of those before Python looks for garbage in younger and older ones.
# Its default is 700, 10 and 10.
GARBAGE_THRESHOLDS = (50_000, 10, 10)


def collect_garbage_rarely() -> None:
    """Has Python look for garbage after 50,000 new objects instead of 700. It is found later; no result differs."""
    gc.set_threshold(*GARBAGE_THRESHOLDS)


def end_process(code: int) -> NoReturn:
    """Ends this process as `sys.exit` does, but for the objects: the system frees their memory at once.

    Threads that are no daemons are waited for, functions of `atexit` are called, and what was printed is written.
    """
    # Python calls both at the end of a process, and has no public way to call them without all that follows.
    ends: Any = (threading._shutdown, atexit._run_exitfuncs)  # type: ignore[attr-defined]
    for end in ends:
        end()
    # A process without a terminal may have neither.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        # Nobody reads any more, or the disk is full: Python says so with this code.
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)

"""A module of the project as a process beside this one, which gets requests on its standard input and answers by lines
of JSON: how it is started and ended here, and what it does first there.

The process is `python -m firstlight.pipeline.child_module MODULE`.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from firstlight.pipeline.process_life import collect_garbage_rarely

# Seconds between two looks of a process at whether the one that started it is still there.
PARENT_POLL_S = 0.2


def start_module(name: str) -> subprocess.Popen[bytes]:
    """Starts a process that runs a module as its main program, and finds what this process can import.

    Ctrl-C is left to this process. When this one has ended, the other one ends at once.
    """
    return subprocess.Popen(
        # The current folder is left out of the path, as its files may have the names of modules.
        [sys.executable, "-P", "-m", __name__, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
    )


def send_bytes(process: subprocess.Popen[bytes], data: bytes) -> bool:
    """Writes to the standard input of a process. Returns False if the process has ended."""
    assert process.stdin is not None
    try:
        process.stdin.write(data)
        process.stdin.flush()
    except OSError:
        return False
    return True


def end_processes(processes: Sequence[subprocess.Popen[bytes]], threads: Sequence[threading.Thread]) -> None:
    """Ends processes, and waits until they are gone and the threads that read their answers have ended."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for thread in threads:
        thread.join()
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            # An answer that the process could not write any more is not missed.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def open_answers() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that sends an answer to the process that has started this one."""
    # The prints of a library are no answers, so stdout becomes stderr.
    with open(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(value: dict[str, Any]) -> None:
            answers.write(json.dumps(value) + "\n")
            answers.flush()

        yield answer


def _run_module(name: str) -> None:
    """Runs a module as the main program of this process.

    All is set up before its imports, which take seconds: a fifth of that would go into the search for garbage.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    collect_garbage_rarely()
    end_with_parent()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def end_with_parent() -> None:
    """Starts a thread that ends this process when the one that started it is gone, by whatever ended that one."""
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True, name="parent").start()


def _wait_for_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


if __name__ == "__main__":
    _run_module(sys.argv[1])

"""A process beside this one: what it can import, what counts as an answer, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from firstlight.pipeline.child_module import end_processes, send_bytes, start_module
from firstlight.pipeline.process_life import GARBAGE_THRESHOLDS

ECHO = """
import gc, signal, sys, threading
facts = {
    "garbage": gc.get_threshold()[0],
    "ctrl_c": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    "threads": [thread.name for thread in threading.enumerate()],
    "arguments": sys.argv[1:],
}
from firstlight.pipeline.child_module import open_answers
with open_answers() as answer:
    print("what a library prints")
    answer({"module": __name__, "facts": facts})
    for line in sys.stdin.buffer:
        answer({"heard": line.decode()})
"""
STARTS_ANOTHER = """
import sys, time
from firstlight.pipeline.child_module import start_module
print(start_module("echo_of_tests").pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "echo_of_tests.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "echo_of_tests"


def read_answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def test_a_process_is_set_up_before_its_imports(echo: str) -> None:
    process = start_module(echo)
    assert read_answer(process)["facts"] == {
        "garbage": GARBAGE_THRESHOLDS[0],
        "ctrl_c": True,
        "threads": ["MainThread", "parent"],
        "arguments": [echo],
    }
    end_processes([process], [])


def test_a_process_answers_and_goes_on_after_ctrl_c(echo: str) -> None:
    process = start_module(echo)
    assert read_answer(process)["module"] == "__main__"
    process.send_signal(signal.SIGINT)
    assert send_bytes(process, b"one\n")
    assert read_answer(process) == {"heard": "one\n"}
    process.kill()
    process.wait()
    assert not send_bytes(process, b"two\n")
    end_processes([process], [])


def test_processes_are_ended_with_the_threads_that_wait_for_them(echo: str) -> None:
    process = start_module(echo)
    assert process.stdout is not None
    thread = threading.Thread(target=process.stdout.read)
    thread.start()
    end_processes([process], [thread])
    assert process.returncode == -signal.SIGKILL
    assert not thread.is_alive()
    assert process.stdout.closed


def test_a_process_ends_with_the_one_that_started_it(echo: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STARTS_ANOTHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as first:
        assert first.stdout is not None
        other = psutil.Process(int(first.stdout.readline()))
        first.kill()
    end = time.monotonic() + 60
    while other.is_running() and other.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE

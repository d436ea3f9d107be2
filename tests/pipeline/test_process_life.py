"""A process of a command ends with its code and all that it was to write, and collects garbage rarely."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from firstlight.pipeline import process_life

PROGRAM = """
import atexit, gc, sys, threading, time
from pathlib import Path
from firstlight.pipeline.process_life import collect_garbage_rarely, end_process

class Slow:
    def __del__(self):
        Path(sys.argv[1], "freed").touch()

def work():
    time.sleep(0.3)
    Path(sys.argv[1], "thread").touch()

collect_garbage_rarely()
kept = Slow()
atexit.register(lambda: Path(sys.argv[1], "atexit").touch())
threading.Thread(target=work).start()
sys.stdout.write("written")
end_process(int(sys.argv[2]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_process_ends_after_its_threads_and_exit_functions_but_frees_nothing(code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "written", "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["atexit", "thread"]


def test_closed_pipe_ends_with_the_exit_code_of_python(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # The prints of the process wait in it until it ends.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 120


def test_garbage_is_looked_for_rarely() -> None:
    before = gc.get_threshold()
    try:
        process_life.collect_garbage_rarely()
        assert gc.get_threshold() == process_life.GARBAGE_THRESHOLDS
    finally:
        gc.set_threshold(*before)

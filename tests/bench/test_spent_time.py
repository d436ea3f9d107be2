"""The time of work: CPU seconds are those of all processes that take part in it."""

import subprocess
import sys
import time

from bench.spent_time import SpentTime


def test_a_child_that_ended_is_counted() -> None:
    before = SpentTime.read()
    # The system counts in steps of 0.01 s.
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"]
    subprocess.run(busy, check=True)
    ended = SpentTime.read().since(before)
    assert ended.cpu_s >= 0.3
    assert ended.wall_s >= 0.3


def test_a_child_that_runs_is_counted() -> None:
    before = SpentTime.read()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while SpentTime.read().since(before).cpu_s < 0.2:
            time.sleep(0.05)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()

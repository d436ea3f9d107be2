"""The watchdog ends a hanging single-worker process in time and records where it was. Each case has its own process."""

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.run import launch
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import watchdog
from firstlight.pipeline.train.attempts import ATTEMPTS_FILE
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics_rows
from tests.support import recipes
from tests.support.clean_process import run_in_clean_process
from tests.support.lone_worker import run_attempt
from tests.support.paths import ROOT

# The timer ends a process after 0.4 to 0.5 s without a heartbeat.
HEAD = """
import time
from pathlib import Path
from firstlight.pipeline.train import watchdog
watchdog.REARM_S = 0.1
def hold_interpreter():
    (10**9) ** (10**9)
def sleep_long():
    time.sleep(60)
"""

# The facts of an attempt that reports show.
MACHINE = {"host": "h", "system": "s", "device": "cpu", "cpus": 2, "workers": 1, "threads": 1, "versions": {}}


def run_watched(folder: Path, body: str) -> tuple[int, float, str]:
    """Returns the exit code, the seconds and the recorded traceback of a watched process."""
    program = f"{HEAD}\nwith watchdog.watch_process(Path({str(folder)!r}), 0.4):\n    {body}\n"
    start = time.monotonic()
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=600, check=False)
    return process.returncode, time.monotonic() - start, (folder / watchdog.HANG_FILE).read_text()


@pytest.mark.fault(4, "a worker that is alone, in code that waits or computes")
@pytest.mark.parametrize("function", ["sleep_long", "hold_interpreter"])
def test_hanging_process_exits_and_records_its_traceback(tmp_path: Path, function: str) -> None:
    code, seconds, traceback = run_watched(tmp_path, f"watchdog.send_heartbeat(); {function}()")
    assert code == 1
    assert seconds < 20, "with the start of an interpreter"
    assert f"in {function}" in traceback
    assert watchdog.has_hung(tmp_path)
    watchdog.delete_hang_record(tmp_path)
    assert not watchdog.has_hung(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        # Everything may take long before the first step.
        "time.sleep(1.2)",
        "watchdog.send_heartbeat(); watchdog.suspend_timer(); time.sleep(1.2)",
        "[(watchdog.send_heartbeat(), time.sleep(0.12)) for _ in range(10)]",
    ],
    ids=["before the first heartbeat", "suspended", "with heartbeats"],
)
def test_process_with_heartbeats_or_suspended_timer_is_not_ended(tmp_path: Path, body: str) -> None:
    code, _, traceback = run_watched(tmp_path, body)
    assert (code, traceback) == (0, "")
    assert not watchdog.has_hung(tmp_path)


def attempt_training(folder: Path, store: Store, fault: str) -> int:
    """Makes one attempt of a lone worker, as Ray does. Returns the exit code of its process."""
    recipe = recipes.recipe(folder, scale__workers=1, scale__cpus=3, scale__collective_timeout_s=5)
    instance = asdict(StageInstance("pretrain", 0, "f", folder / "job"))
    payload: dict[str, Any] = {
        "recipe": recipe.dump(),
        "store": str(store.path),
        "instances": [{key: str(value) if isinstance(value, Path) else value for key, value in instance.items()}],
    }
    return run_in_clean_process(run_attempt, payload, 2.0, environment={"FIRSTLIGHT_FAULT": fault}, timeout_s=600)


@pytest.mark.fault(4, "a worker that is alone goes on from its checkpoint")
def test_hanging_lone_worker_is_ended_and_next_attempt_resumes_with_note(tmp_path: Path, digits: Store) -> None:
    fault = f"rank=0,step=4,kind=hang,once={tmp_path / 'once'}"
    assert attempt_training(tmp_path, digits, fault) == 1
    assert "inject_fault" in (tmp_path / "job" / watchdog.HANG_FILE).read_text(), "the function that slept"
    assert launch._last_attempt_hung(tmp_path / "job")
    assert attempt_training(tmp_path, digits, fault) == 0
    rows = read_metrics_rows(tmp_path / "job" / METRICS_FILE)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    notes = [row["note"] for row in rows if "note" in row]
    assert any(note.startswith("it hung and was restarted; its stack is in ") for note in notes)
    assert any("continued from the checkpoint of step 3" in note for note in notes)
    assert not launch._last_attempt_hung(tmp_path / "job"), "the last attempt did not"


def test_message_of_a_hang_names_key_and_file(tmp_path: Path) -> None:
    scale = recipes.recipe(tmp_path, scale__workers=1, scale__cpus=3, scale__collective_timeout_s=7).scale
    message = launch._describe_hang(tmp_path / "pretrain-seed0", scale)
    assert message.startswith("pretrain-seed0: ")
    assert "scale.collective_timeout_s: 7" in message
    assert message.endswith(f"{tmp_path}/pretrain-seed0/hung.txt")


def test_attempt_that_fails_after_a_hang_does_not_count_as_hung(tmp_path: Path) -> None:
    (tmp_path / watchdog.HANG_FILE).write_text("Timeout")
    append_json_line(tmp_path / ATTEMPTS_FILE, {"began": 1.0, "machine": MACHINE})
    assert launch._last_attempt_hung(tmp_path)
    append_json_line(tmp_path / ATTEMPTS_FILE, {"ended": 2.0, "seconds": 1.0})
    assert not launch._last_attempt_hung(tmp_path)

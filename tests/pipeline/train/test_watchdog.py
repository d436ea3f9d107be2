"""A process that hangs alone: it ends itself in time, and says where it was. Each case in a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.run import launch
from firstlight.pipeline.train import watchdog
from firstlight.pipeline.train.attempts import ATTEMPTS_FILE
from firstlight.pipeline.train.metrics import METRICS_FILE, read_rows
from tests.support import recipes
from tests.support.paths import ROOT

HEAD = """
import time
from pathlib import Path
from pipeline import watchdog
def holding_the_interpreter():
    (10**9) ** (10**9)
def sleeping():
    time.sleep(60)
"""


def ended(folder: Path, body: str) -> tuple[int, float, str]:
    """Exit code, seconds and the traceback that was left."""
    program = f"{HEAD}\nwith watchdog.watched(Path({str(folder)!r}), 1.0):\n    {body}\n"
    start = time.monotonic()
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    return process.returncode, time.monotonic() - start, (folder / watchdog.HANG_FILE).read_text()


@pytest.mark.fault(4, "a worker that is alone, in code that waits or computes")
@pytest.mark.parametrize("how", ["sleeping", "holding_the_interpreter"])
def test_what_makes_no_step_ends_and_leaves_where_it_was(tmp_path: Path, how: str) -> None:
    code, seconds, left = ended(tmp_path, f"watchdog.alive(); {how}()")
    assert code == 1
    assert seconds < 20, "with the start of an interpreter"
    assert f"in {how}" in left
    assert watchdog.has_hung(tmp_path)
    watchdog.delete_hang_record(tmp_path)
    assert not watchdog.has_hung(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(3)",  # before the first step all may take long
        "watchdog.alive(); watchdog.pause(); time.sleep(3)",
        "[(watchdog.alive(), time.sleep(0.2)) for _ in range(18)]",
    ],
    ids=["not begun", "paused", "alive"],
)
def test_what_is_alive_or_has_a_pause_is_left_alone(tmp_path: Path, body: str) -> None:
    code, _, left = ended(tmp_path, body)
    assert (code, left) == (0, "")
    assert not watchdog.has_hung(tmp_path)


def attempt(folder: Path, store: Store, **environment: str) -> int:
    """One attempt of a lone worker, as Ray makes it; its exit code."""
    recipe = recipes.recipe(folder, scale__workers=1, scale__cpus=3, scale__collective_timeout_s=5)
    job = {"stage": "pretrain", "seed": 0, "fingerprint": "f", "folder": str(folder / "job")} | dict.fromkeys(
        ("encoder", "companion", "begin")
    )
    payload: dict[str, Any] = {
        "recipe": recipe.dump(),
        "store": str(store.path),
        "instances": [job],
    }
    program = (
        "import json, sys; from tests.support.lone_worker import run_attempt; run_attempt(json.loads(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, json.dumps(payload)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, timeout=120, check=False).returncode


@pytest.mark.fault(4, "a worker that is alone goes on from its checkpoint")
def test_a_lone_worker_that_hangs_is_ended_and_its_next_attempt_says_so(tmp_path: Path, digits: Store) -> None:
    wanted = f"rank=0,step=4,kind=hang,once={tmp_path / 'once'}"
    assert attempt(tmp_path, digits, FIRSTLIGHT_FAULT=wanted) == 1
    assert "maybe" in (tmp_path / "job" / watchdog.HANG_FILE).read_text(), "the name of the function that slept"
    assert launch._last_attempt_hung(tmp_path / "job")
    assert attempt(tmp_path, digits, FIRSTLIGHT_FAULT=wanted) == 0
    rows = read_rows(tmp_path / "job" / METRICS_FILE)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    notes = [row["note"] for row in rows if "note" in row]
    assert any(note.startswith("it hung, and was started anew; where it was: ") for note in notes)
    assert any("continued from the checkpoint of step 3" in note for note in notes)
    assert not launch._last_attempt_hung(tmp_path / "job"), "the last attempt did not"


def test_the_line_at_the_end_names_the_key_and_the_file(tmp_path: Path) -> None:
    scale = recipes.recipe(tmp_path, scale__workers=1, scale__cpus=3, scale__collective_timeout_s=7).scale
    told = launch._describe_hang(tmp_path / "pretrain-seed0", scale)
    assert (
        told
        == f"pretrain-seed0: no step was made within scale.collective_timeout_s: 7; where it was: {tmp_path}/pretrain-seed0/hung.txt"
    )


def test_an_attempt_that_fails_otherwise_after_a_hang_is_not_told_as_one(tmp_path: Path) -> None:
    (tmp_path / watchdog.HANG_FILE).write_text("Timeout")
    append_json_line(tmp_path / ATTEMPTS_FILE, {"began": 1.0, "machine": {}})
    assert launch._last_attempt_hung(tmp_path)
    append_json_line(tmp_path / ATTEMPTS_FILE, {"ended": 2.0, "seconds": 1.0})
    assert not launch._last_attempt_hung(tmp_path)

"""The driver shows and logs the rows that workers append to a file, which a restart may truncate."""

import io
import json
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.tracking import progress
from firstlight.pipeline.tracking.progress import FollowedFile, JsonRows, ProgressCounter, ProgressFollower


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "of": 10, "time": 1000.0 + step, "loss": 1 / step, "images_per_s": 100.0, **more}


def line(step: int, **more: Any) -> str:
    return json.dumps(row(step, **more)) + "\n"


class Log:
    """A client that keeps what it gets in the place of MLflow; `fails` is raised instead while it is set."""

    def __init__(self) -> None:
        self.rows: JsonRows = []
        self.fails: Exception | None = None

    def __call__(self, rows: JsonRows) -> None:
        if self.fails is not None:
            raise self.fails
        self.rows += rows

    @property
    def steps(self) -> list[int]:
        return [r["step"] for r in self.rows]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def followed(tmp_path: Path, log: Log) -> FollowedFile:
    return FollowedFile(tmp_path / "metrics.jsonl", "pretrain seed 0", log)


def append(followed: FollowedFile, text: str) -> None:
    with open(followed.file, "a") as file:
        file.write(text)


def steps(followed: FollowedFile) -> list[int]:
    return [r["step"] for r in followed.read_new_rows()]


def test_file_that_does_not_exist_yet_has_no_rows(followed: FollowedFile) -> None:
    assert followed.read_new_rows() == []
    append(followed, line(1))
    assert followed.read_new_rows() == [row(1)]


def test_line_is_read_once_it_is_complete(followed: FollowedFile) -> None:
    whole = line(2)
    for cut in range(1, len(whole)):
        followed.file.write_text(line(1) + whole[:cut])
        fresh = FollowedFile(followed.file, "", followed.log)
        assert steps(fresh) == [1]
        assert steps(fresh) == []
        append(followed, whole[cut:] + line(3))
        assert steps(fresh) == [2, 3]
        assert steps(fresh) == []


def test_truncated_file_is_read_from_its_start(followed: FollowedFile) -> None:
    append(followed, "".join(map(line, (1, 2, 3, 4))))
    assert steps(followed) == [1, 2, 3, 4]
    followed.file.write_text("".join(map(line, (1, 2))))
    assert steps(followed) == [1, 2]
    append(followed, line(3))
    assert steps(followed) == [3]


@pytest.mark.parametrize("again", [2, 3, 5])
def test_file_truncated_and_grown_between_two_reads_is_read_from_its_start(followed: FollowedFile, again: int) -> None:
    """The new rows have other lengths: reading on at the old place would start in the middle of one."""
    append(followed, "".join(map(line, (1, 2, 3))))
    assert steps(followed) == [1, 2, 3]
    followed.file.write_text(line(1) + "".join(line(k, images_per_s=98.76543) for k in range(2, again + 1)))
    assert steps(followed) == list(range(1, again + 1))
    append(followed, line(again + 1))
    assert steps(followed) == [again + 1]


def test_emptied_file_is_read_from_its_start(followed: FollowedFile) -> None:
    append(followed, line(1))
    assert steps(followed) == [1]
    followed.file.write_text("")
    assert steps(followed) == []
    append(followed, line(1) + line(2))
    assert steps(followed) == [1, 2]


def test_incomplete_row_of_a_killed_worker_is_skipped(followed: FollowedFile) -> None:
    append(followed, line(1) + line(2)[:20] + json.dumps({"note": "continued"}) + "\n" + line(2))
    assert steps(followed) == [1, 2]


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(output: Console) -> str:
    assert isinstance(output.file, io.StringIO)
    return output.file.getvalue()


@pytest.fixture
def read_once(followed: FollowedFile) -> Callable[[], str]:
    """Reads the file once, without the thread. Returns what was printed so far."""
    output = console()
    its = ProgressFollower(output, "pretrain", [followed])
    its.started = 0.0

    def call() -> str:
        its._read_files()
        its._send_rows()
        return text(output)

    return call


def test_repeated_steps_are_not_logged_again(followed: FollowedFile, log: Log, read_once: Callable[[], str]) -> None:
    append(followed, "".join(map(line, (1, 2, 3, 4))))
    read_once()
    followed.file.write_text("".join(map(line, (1, 2))))
    read_once()
    append(followed, "".join(map(line, (3, 4, 5))))
    read_once()
    assert log.steps == [1, 2, 3, 4, 5]


def test_steps_logged_by_an_earlier_run_are_not_logged_again(tmp_path: Path, log: Log) -> None:
    followed = FollowedFile(tmp_path / "metrics.jsonl", "pretrain seed 0", log, logged=3)
    append(followed, "".join(map(line, range(1, 6))))
    its = ProgressFollower(console(), "pretrain", [followed])
    its._read_files()
    its._send_rows()
    assert log.rows == [row(4), row(5)]


def test_a_slow_mlflow_is_sent_to_less_often(followed: FollowedFile, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a twentieth of the time at most, or has waited for ten seconds."""
    clock, took = [100.0], [0.2]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    its = ProgressFollower(console(), "pretrain", [followed])
    real = followed.log

    def log_slowly(rows: JsonRows) -> None:
        clock[0] += took[0]
        real(rows)

    followed.log = log_slowly
    append(followed, line(1))
    its._read_files()
    its._send_rows()
    assert its.next_send == pytest.approx(100.0 + 0.2 / 0.05)
    append(followed, line(2))
    its._read_files()
    clock[0], took[0] = 200.0, 3.0
    its._send_rows()
    assert its.next_send == pytest.approx(200.0 + 10.0)
    assert log.steps == [1, 2]


def test_rows_wait_until_mlflow_is_due(followed: FollowedFile, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    with ProgressFollower(console(), "pretrain", [followed]) as its:
        its.next_send = math.inf
        append(followed, line(1))
        while not followed.pending:
            time.sleep(0.01)
        assert log.steps == []
        its.next_send = 0.0
        while not log.steps:
            time.sleep(0.01)
    assert log.steps == [1]


def test_rows_without_a_loss_are_shown_but_not_logged(
    followed: FollowedFile, log: Log, read_once: Callable[[], str]
) -> None:
    sweep = {k: v for k, v in row(5).items() if k != "loss"}
    append(followed, json.dumps(sweep) + "\n" + json.dumps({"note": "hello"}) + "\n")
    assert "note pretrain seed 0: hello" in read_once()
    assert followed.share_done == 0.5
    assert log.rows == []


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), TimeoutError()])
def test_rows_refused_by_mlflow_are_logged_later(
    followed: FollowedFile, log: Log, read_once: Callable[[], str], error: Exception
) -> None:
    """An error without a text too."""
    log.fails = error
    append(followed, line(1) + line(2))
    read_once()
    append(followed, line(3))
    read_once()
    assert log.rows == []
    assert followed.problem == ("no route to host" if error.args else "TimeoutError")
    log.fails = None
    read_once()
    read_once()
    assert log.rows == [row(1), row(2), row(3)]
    assert (followed.pending, followed.problem) == ([], "")


@pytest.mark.parametrize("note", ["a plain one", "[/tmp/x] and [bold] are text", "passed over: /a/[b]/c"])
def test_note_is_printed_once_and_unchanged(followed: FollowedFile, read_once: Callable[[], str], note: str) -> None:
    for _ in range(2):
        append(followed, json.dumps({"note": note}) + "\n" + line(1))
        output = read_once()
    assert output.count(f"note pretrain seed 0: {note}\n") == 1


def test_without_a_terminal_start_and_end_are_lines(followed: FollowedFile, log: Log) -> None:
    output = console()
    with ProgressFollower(output, "pretrain", [followed]) as its:
        append(followed, line(1) + line(9))
    assert text(output) == "pretrain: started\npretrain: done after 0 s, pretrain seed 0  100 images/s  loss 0.1111\n"
    assert log.steps == [1, 9], "the rows after the last poll are logged"
    assert not its.thread.is_alive()


def test_failure_is_not_called_done(followed: FollowedFile) -> None:
    output = console()
    with pytest.raises(KeyboardInterrupt), ProgressFollower(output, "pretrain", [followed]):
        raise KeyboardInterrupt
    assert text(output) == "pretrain: started\npretrain: stopped after 0 s\n"


def test_rows_never_accepted_by_mlflow_are_noted(followed: FollowedFile, log: Log) -> None:
    output, log.fails = console(), ConnectionError("the server [/x] is down")
    with ProgressFollower(output, "pretrain", [followed]):
        append(followed, line(1) + line(2))
    assert "note pretrain seed 0: 2 rows are not in MLflow yet (the server [/x] is down)" in text(output)
    assert str(followed.file) in text(output)


def test_thread_reads_files_while_the_block_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.001)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", -1.0)
    got = threading.Event()
    followed = FollowedFile(tmp_path / "metrics.jsonl", "pretrain seed 0", lambda rows: got.set())
    append(followed, line(5))
    output = console()
    with ProgressFollower(
        output, "pretrain", [followed, FollowedFile(tmp_path / "other", "pretrain seed 1", lambda rows: None)]
    ):
        assert got.wait(5)
    assert "pretrain: 25%  pretrain seed 0  100 images/s  loss 0.2000  about 0 s left\n" in text(output)


def test_counted_work_ends_with_a_line() -> None:
    output = console()
    with ProgressCounter(output, "prepare") as counted:
        counted.show_count(500, 1500)
        counted.show_count(1500, 1500)
    assert text(output) == "prepare: 1,500 images in 0 s\n"
    with ProgressCounter(output, "prepare") as counted:
        counted.show_count(1500, 1500)
        counted.remark = " (1,000 of them in digits-abc)"
    assert text(output).endswith("prepare: 1,500 images (1,000 of them in digits-abc) in 0 s\n")


def test_long_counted_work_prints_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    output = console()
    with ProgressCounter(output, "prepare") as counted:
        counted.started -= 10.0
        counted.show_count(500, 1500)
        counted.show_count(1500, 1500)
    assert re.fullmatch(
        r"prepare: 500 of 1,500 images  (49|50) images/s  about 20 s left\nprepare: 1,500 images in 10 s\n",
        text(output),
    )


def fail_half_way(output: Console) -> None:
    with ProgressCounter(output, "prepare") as counted:
        counted.show_count(1, 2)
        raise OSError("the disk is gone")


def test_counted_work_without_images_or_with_an_error_prints_nothing() -> None:
    output = console()
    with ProgressCounter(output, "prepare"):
        pass
    with pytest.raises(OSError, match="the disk is gone"):
        fail_half_way(output)
    assert text(output) == ""

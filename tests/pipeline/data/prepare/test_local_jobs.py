"""Several processes of a machine write a store to the bytes that one writes, and none of them outlives its command."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.prepare import jobs, local_jobs
from firstlight.pipeline.data.prepare import prepare as module
from firstlight.pipeline.data.prepare.jobs import PartWriter, PrepareJob, list_jobs
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.errors import StageFailed, UserError
from tests.support.grey_images import dataset, images, local, silent
from tests.support.paths import ROOT
from tests.support.stopped_prepare import contents

# `prepare` with processes, from the first image on, which prints when it has decoded its first part, and waits.
COMMAND = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from firstlight.pipeline.data.prepare import jobs, local_jobs, prepare as module
module.IMAGES_PER_SHARD, jobs.IMAGES_PER_REPORT, local_jobs.SECONDS_ALONE = 10, 1, 0.0
jobs.write_shard = lambda *arguments: (list(arguments[2]), print("begun", flush=True), sys.stdin.read())
fields, out = json.loads(sys.argv[1]), Path(sys.argv[2])
module.prepare(SimpleNamespace(**fields, pixels=None), out, lambda: False, lambda done, total: None, processes=3)
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetOptions:
    """45 training images, three of them bad, in 5 parts, and 6 test images."""
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 10)
    return dataset(root=images(tmp_path / "in", 45, bad=(2, 4, 31)), max_bad_fraction=0.2)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started, from the first image on."""
    monkeypatch.setattr(local_jobs, "SECONDS_ALONE", 0.0)
    monkeypatch.setattr(jobs, "IMAGES_PER_REPORT", 1)
    found: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def follow(*arguments: Any, **options: Any) -> Any:
        found.append(start(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(local_jobs.subprocess, "Popen", follow)
    return found


def write_slowly(writer: PartWriter, parts: list[PrepareJob], processes: int) -> list[PrepareJob]:
    """Runs jobs while this process takes so long for its first one that the others do the rest."""
    waiting_until = time.monotonic() + 60

    def wait(job: PrepareJob, done: int) -> None:
        while others[0].waiting.qsize():
            assert time.monotonic() < waiting_until
            time.sleep(0.01)

    others: list[Any] = []
    create = local_jobs._OtherProcesses

    def keep(*arguments: Any) -> Any:
        others.append(create(*arguments))
        return others[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_jobs, "_OtherProcesses", keep)
        return list(local_jobs.run_on_this_machine(dataclasses.replace(writer, report=wait), parts, processes))


def test_several_processes_write_the_bytes_of_one(
    data: DatasetOptions, started: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    together = module.prepare(data, tmp_path / "many", lambda: False, lambda *counts: seen.append(counts), processes=3)
    assert len(started) == 4, "two wrote the parts, and two renumbered those after a bad image"
    assert all(process.poll() is not None for process in started)
    monkeypatch.setattr(local_jobs, "SECONDS_ALONE", 1e9)
    alone = local(data, tmp_path / "one")
    assert contents(together) == contents(alone)
    assert together.quarantined == 3
    assert len(started) == 4, "nothing more was started for the second"
    # The counts of images in the parts, whoever writes them; the store is opened after that.
    written = [done for done, total in seen if total == 51]
    assert max(written) == 51
    assert written[: written.index(51)] == sorted(written[: written.index(51)])


def test_other_processes_do_the_parts_that_wait(
    data: DatasetOptions, started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    source = open_source(data)
    parts = list_jobs(source, 10)
    (tmp_path / "parts").mkdir()
    results = write_slowly(PartWriter(source, tmp_path / "parts", data.max_pixels), parts, 3)
    assert sorted(result["job"]["file"] for result in results) == sorted(part["file"] for part in parts)
    # This process waited in its first part until the others had taken all that were left.
    assert results[0]["job"]["file"] == parts[0]["file"]
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


def test_a_set_that_is_written_at_once_starts_no_process(
    data: DatasetOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_jobs.subprocess, "Popen", lambda *arguments, **options: pytest.fail("it was started"))
    assert local(data, tmp_path / "out").quarantined == 3


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        ({"mistake": "dataset.list: row 3 is wrong"}, UserError, "^dataset.list: row 3 is wrong$"),
        ({"problem": "its process ended"}, StageFailed, "^prepare: images 10 to 20 of 'train': its process ended$"),
    ],
)
def test_error_of_another_process_is_raised_in_one_line(
    data: DatasetOptions, tmp_path: Path, answer: dict[str, Any], error: type[Exception], text: str
) -> None:
    source = open_source(data)
    others = local_jobs._OtherProcesses(PartWriter(source, tmp_path, 100), local_jobs.queue.SimpleQueue())
    others.answers.put((list_jobs(source, 10)[1], answer))
    with pytest.raises(error, match=text):
        list(others.take_results())


def test_an_error_of_a_job_is_an_answer(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> Any:
        def work(job: PrepareJob) -> PrepareJob:
            raise error

        return work

    assert local_jobs._do_job(lambda job: {"shard": None}, {}) == {"result": {"shard": None}}
    assert local_jobs._do_job(fail(UserError("dataset.root: x")), {}) == {"mistake": "dataset.root: x"}
    assert local_jobs._do_job(fail(RuntimeError("two\nlines")), {}) == {"problem": "two lines"}
    assert "RuntimeError" in capfd.readouterr().err


def test_a_process_that_starts_too_late_is_not_waited_for(
    data: DatasetOptions, started: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "sleeps"))
    (tmp_path / "sleeps").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "sleeps").chmod(0o755)
    assert local(data, tmp_path / "out").quarantined == 3
    assert [process.poll() for process in started] == [-signal.SIGKILL] * len(started)
    assert started


class FatalSource:
    """A source that ends every other process that reads it, as a decoder with a fault would."""

    def __init__(self, source: Any) -> None:
        self.source, self.annotations, self.classes, self.reader = (
            source,
            source.annotations,
            source.classes,
            os.getpid(),
        )

    def read(self, part: Any) -> Iterator[Any]:
        if os.getpid() != self.reader:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from self.source.read(part)


def test_a_process_that_ends_is_named_by_its_images(
    data: DatasetOptions, started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    source = open_source(data)
    writer = PartWriter(FatalSource(source), tmp_path, data.max_pixels)  # type: ignore[arg-type]
    with pytest.raises(StageFailed, match=r"^prepare: images \d+ to \d+ of '\w+': its process ended$"):
        write_slowly(writer, list_jobs(source, 10)[:2], 2)
    assert [process.poll() for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_a_command_that_is_killed(
    data: DatasetOptions, tmp_path: Path, ended_by: signal.Signals
) -> None:
    arguments = [sys.executable, "-c", COMMAND, data.model_dump_json(), str(tmp_path / "out")]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"begun\n"
        children = psutil.Process(command.pid).children(recursive=True)
        assert len(children) == 2
        command.send_signal(ended_by)
        command.wait(30)
    assert not psutil.wait_procs(children, timeout=30)[1]


class OwnSource:
    """A source that another process cannot import: it looks for it in its own `__main__`."""


class OpenSource:
    """A source that cannot be handed over."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle")


@pytest.mark.parametrize(("source", "count"), [(OwnSource(), 2), (OpenSource(), 0)])
def test_a_source_that_no_other_process_has_stays_in_this_one(
    source: Any, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setattr(OwnSource, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "OwnSource", OwnSource, raising=False)
    waiting = local_jobs.queue.SimpleQueue[PrepareJob]()
    waiting.put({"split": "train"})
    others = local_jobs._OtherProcesses(PartWriter(source, tmp_path, 100), waiting)
    others.start(2)
    for thread in others.threads:
        thread.join(60)
    assert len(started) == count
    assert not others.take_results()
    assert waiting.qsize() == 1, "it is left for this process"
    others.close()


def test_processes_are_started_as_soon_as_the_waiting_parts_seem_long(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[PrepareJob] = [{"file": str(k), "count": 1000} for k in range(3)]
    pace, now = local_jobs._Pace(parts), [0.0]
    pace.begun = 0.0
    monkeypatch.setattr(local_jobs.time, "monotonic", lambda: now[0])
    found = []
    for now[0], done in ((0.1, 100), (0.4, 100), (0.4, 1000), (2.1, 1000)):
        pace.show_count(parts[0], done)
        found.append(pace.is_slow())
    # 2,000 images wait: at 250 images/s for 8 s, at 2,500 for less than a second.
    assert found == [False, True, False, True]
    assert not local_jobs._Pace(parts[:1]).is_slow()


def test_others_do_all_jobs_of_a_busy_process(
    data: DatasetOptions, started: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_jobs, "BACKGROUND_IMAGES", 10)
    source = open_source(data)
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(local_jobs, "_set_report", lambda work, report: lambda job: pytest.fail("it was done here"))
    writer, parts = PartWriter(source, tmp_path / "parts", data.max_pixels), list_jobs(source, 10)
    results = list(local_jobs.run_on_this_machine(writer, parts, 3, lambda: True))
    assert sorted(result["job"]["file"] for result in results) == sorted(part["file"] for part in parts)
    assert len(started) == 2


def test_busy_process_does_what_no_other_can(
    data: DatasetOptions, started: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_jobs, "BACKGROUND_IMAGES", 10)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    store = module.prepare(data, tmp_path / "out", lambda: False, silent, processes=3, is_busy=lambda: True)
    assert store.quarantined == 3
    assert started


def test_few_images_of_a_busy_process_start_no_other(
    data: DatasetOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_jobs.subprocess, "Popen", lambda *arguments, **options: pytest.fail("it was started"))
    store = module.prepare(data, tmp_path / "out", lambda: False, silent, processes=3, is_busy=lambda: True)
    assert store.quarantined == 3

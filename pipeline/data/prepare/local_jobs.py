"""Runs the jobs of `prepare` on this machine without Ray: in this process, and if they take long in others beside it.

Another process runs this module as its main program, see `child_module`. It gets the work as a pickle on its standard
input, and says {"ready": true} if it could read it. Then it gets jobs, one a line, and answers each with lines of JSON:
{"done": images so far} now and then by a `PartWriter`, at the end {"result"}, or {"mistake"} or {"problem"} with a
text.
"""

import contextlib
import json
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from firstlight.pipeline.child_module import end_processes, open_answers, send_bytes, start_module
from firstlight.pipeline.data.prepare.jobs import PartWriter, PrepareJob
from firstlight.pipeline.errors import StageFailed, UserError, one_line

# Seconds of work in this process after which the rest of it is estimated. Others are started if the parts that wait
# would take it longer than REST_SECONDS, or at the latest after SECONDS_ALONE: each needs most of a second to start.
ESTIMATE_AFTER = 0.3
REST_SECONDS = 1.0
SECONDS_ALONE = 2.0
# The images from which other processes do the work of a command that is busy with something else meanwhile.
BACKGROUND_IMAGES = 512
# Each takes some 150 MB.
MAX_PROCESSES = 64
# A job, and what a process has answered to it.
Answer = tuple[PrepareJob, dict[str, Any]]
# Does a job, and returns its result: a `PartWriter` or another class of this package.
PrepareWork = Callable[[PrepareJob], PrepareJob]


def run_on_this_machine(
    work: PrepareWork, jobs: list[PrepareJob], processes: int, is_busy: Callable[[], bool] = lambda: False
) -> Generator[PrepareJob]:
    """Yields the results of `work` for each of `jobs`, in any order. A `PartWriter` has its `report` called meanwhile.

    `processes`: the most that work at a time, this one included; there are never more than MAX_PROCESSES.
    `is_busy`: returns True while another thread of this process has work of its own. Other processes begin at once
    then, if the images are many, and this one leaves the jobs to them.

    Raises:
        UserError: a job found a mistake.
        StageFailed: a process ended, or met an error that it did not expect; names the part of the images.
    """
    waiting = queue.SimpleQueue[PrepareJob]()
    for part in jobs:
        waiting.put(part)
    others, pace = _OtherProcesses(work, waiting), _Pace(jobs)
    left = len(jobs)

    def start_others(count: int) -> None:
        if not others.are_started and pace.is_slow():
            others.start(min(processes, MAX_PROCESSES, count) - 1)

    def report(job: PrepareJob, done: int) -> None:
        pace.show_count(job, done)
        # One more job than those that wait is being done here.
        start_others(waiting.qsize() + 1)
        _call_report(work, job, done)
        others.forward_reports()

    here = _set_report(work, report)
    with contextlib.closing(others):
        if is_busy() and pace.total >= BACKGROUND_IMAGES:
            others.start(min(processes - 1, MAX_PROCESSES, len(jobs)))
        # A process that is still starting when all is done is not waited for.
        while left:
            start_others(waiting.qsize())
            job = None if others.num_able and is_busy() else _take(waiting)
            found = [here(job)] if job is not None else others.wait_for_results()
            found += others.take_results()
            left -= len(found)
            yield from found


class _Pace:
    """The pace of this process, and what it says of the jobs that wait."""

    def __init__(self, jobs: list[PrepareJob]) -> None:
        self.begun, self.total = time.monotonic(), sum(job.get("count", 0) for job in jobs)
        self.begun_images, self.done = dict[str, int](), dict[str, int]()

    def show_count(self, job: PrepareJob, done: int) -> None:
        """Notes that `done` images of a job are done."""
        self.begun_images[job["file"]], self.done[job["file"]] = job["count"], done

    def is_slow(self) -> bool:
        """Returns True if the work takes so long that other processes should share it."""
        seconds, done = time.monotonic() - self.begun, sum(self.done.values())
        if seconds > SECONDS_ALONE or not done:
            return seconds > SECONDS_ALONE
        waiting = self.total - sum(self.begun_images.values())
        return seconds > ESTIMATE_AFTER and waiting * seconds / done > REST_SECONDS


def _set_report(work: PrepareWork, report: Callable[[PrepareJob, int], None]) -> PrepareWork:
    """Returns the work with another `report`; only a `PartWriter` has one."""
    return replace(work, report=report) if isinstance(work, PartWriter) else work


def _call_report(work: PrepareWork, job: PrepareJob, done: int) -> None:
    if isinstance(work, PartWriter) and work.report is not None:
        work.report(job, done)


def _take(waiting: queue.SimpleQueue[PrepareJob]) -> PrepareJob | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


class _OtherProcesses:
    """Processes that take waiting jobs, each with a thread here that hands them over and collects the answers."""

    def __init__(self, work: PrepareWork, waiting: queue.SimpleQueue[PrepareJob]) -> None:
        self.work, self.waiting, self.are_started = work, waiting, False
        self.processes: list[subprocess.Popen[bytes]] = []
        self.threads: list[threading.Thread] = []
        self.answers = queue.SimpleQueue[Answer]()
        self.results: list[PrepareJob] = []
        # The processes that have not said that they cannot do the work.
        self.num_able = 0

    def start(self, count: int) -> None:
        """Starts processes, unless they could not do the work: then all of it stays in this one."""
        self.are_started = True
        try:
            work = pickle.dumps(self.work)
        except Exception:
            # A source of another package may hold what cannot be handed over, such as an open file.
            return
        self.num_able = max(count, 0)
        for _ in range(count):
            process = start_module(__spec__.name)
            thread = threading.Thread(target=self._hand_over, args=(process, work), daemon=True, name="prepare")
            self.processes.append(process)
            self.threads.append(thread)
            thread.start()

    def _hand_over(self, process: subprocess.Popen[bytes], work: bytes) -> None:
        """Gives a process its work and then job after job, unless it cannot read the work."""
        assert process.stdout is not None
        if not send_bytes(process, work) or not process.stdout.readline():
            self.answers.put(({}, {"unable": True}))
            return
        while (job := _take(self.waiting)) is not None:
            is_given = send_bytes(process, json.dumps(job).encode() + b"\n")
            answer: dict[str, Any] = {"done": 0}
            while "done" in answer:
                try:
                    answer = json.loads(process.stdout.readline() if is_given else b"")
                except ValueError:
                    answer = {"problem": "its process ended"}
                self.answers.put((job, answer))

    def wait_for_results(self) -> list[PrepareJob]:
        """Waits for an answer, and returns the results that are there."""
        self._look_at(*self.answers.get())
        return self.take_results()

    def forward_reports(self) -> None:
        """Looks at the answers that are there, and keeps the results among them."""
        while not self.answers.empty():
            self._look_at(*self.answers.get())

    def take_results(self) -> list[PrepareJob]:
        """Returns the results that are there, each once."""
        self.forward_reports()
        found, self.results = self.results, []
        return found

    def _look_at(self, job: PrepareJob, answer: dict[str, Any]) -> None:
        if "done" in answer:
            _call_report(self.work, job, answer["done"])
        elif "unable" in answer:
            self.num_able -= 1
        elif "mistake" in answer:
            raise UserError(answer["mistake"])
        elif "problem" in answer:
            first, last = job["start"], job["start"] + job["count"]
            raise StageFailed(f"prepare: images {first:,} to {last:,} of {job['split']!r}: {answer['problem']}")
        else:
            self.results.append(answer["result"])

    def close(self) -> None:
        """Ends the processes, and waits until they are gone."""
        end_processes(self.processes, self.threads)


def _answer_jobs() -> None:
    """Answers the jobs on standard input, until there are no more."""
    with open_answers() as answer:
        try:
            # The pickle comes from the process that started this one, by a pipe that nobody else has.
            work: PrepareWork = pickle.load(sys.stdin.buffer)  # noqa: S301
        except Exception:
            # The work may be of a class of a notebook, which the other process has and this one cannot import.
            return
        answer({"ready": True})
        work = _set_report(work, lambda job, done: answer({"done": done}))
        for line in sys.stdin.buffer:
            answer(_do_job(work, json.loads(line)))


def _do_job(work: PrepareWork, job: PrepareJob) -> dict[str, Any]:
    try:
        return {"result": work(job)}
    except UserError as error:
        return {"mistake": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"problem": one_line(error)}


if __name__ == "__main__":
    _answer_jobs()

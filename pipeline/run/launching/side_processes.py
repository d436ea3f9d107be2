"""Shares the seeds of a stage between the process of a command and others beside it, where training runs without Ray.

Seeds depend on nothing but themselves, and so do the trainings of a fine-tuning, the parts of a seed's instance. Each
process computes with the threads of the stage, see `choose_threads`: one where there is enough to share.
The process of the command begins with the first one. Others take those that wait, and stay for the stages that follow.
They are started before the first stage if the recipe is long, and otherwise once a stage is seen to take long.

Another process runs this module as its main program, see `child_module`. It says {"ready": true}, gets payloads of
`launch.launch_instances` with one instance, one a line, and answers each with a line of JSON: what `run_instances`
returns, {"problem"} with the text of an error, or {"unfit"} if it does not know what the recipe names.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from firstlight.pipeline.child_module import end_processes, open_answers, send_bytes, start_module
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import AUTO
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import StageFailed, UserError, one_line
from firstlight.pipeline.run import memory
from firstlight.pipeline.run.launching.instances import PART_KEY, run_instances
from firstlight.pipeline.run.launching.threads import choose_threads, count_side_by_side
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.train.metrics import append_row
from firstlight.pipeline.usable_cpus import count_usable_cpus

# Seconds of work that must be left for other processes, each of which needs some seconds of a CPU to start, and the
# seconds of a stage's first instance or part that do not come again: imports, and images that are decoded once.
WORTHWHILE_SECONDS, SET_UP_SECONDS = 4.0, 2.0
# The passes of images of this side through networks, in all trainings that can be shared, from which a recipe is long:
# the smallest networks take some seconds for them.
LONG_PASSES, LONG_PASSES_SIDE = 20_000, 32
# The free memory that another process needs, in multiples of what this one has.
MEMORY_PER_PROCESS = 1.5
# Seconds between two looks for Ctrl-C while other processes work, and at whether they should be started.
WAIT_S = 0.2

# The fields of an instance, and what `run_instances` returns.
Fields = dict[str, Any]
StageAnswer = dict[str, Any]


def count_side_processes(recipe: Recipe) -> int:
    """Returns how many processes beside that of the command may share the seeds of a recipe, or their parts, at a time.

    There are none where Ray has the workers or where a GPU is used.
    """
    scale = recipe.scale
    if scale.max_workers or scale.worker_gpus:
        return 0
    return max((_count_processes(recipe, stage) for stage in recipe.stages), default=1) - 1


def _count_processes(recipe: Recipe, stage: str) -> int:
    """Returns how many processes share a stage, that of the command included."""
    scale = recipe.scale
    fit = (scale.cpus or count_usable_cpus()) // choose_threads(recipe, stage)
    most = fit if scale.processes == AUTO else int(scale.processes)
    return max(min(most, count_side_by_side(recipe, stage)), 1)


def is_long(recipe: Recipe, splits: Splits) -> bool:
    """Returns True if the trainings of a recipe that processes can share make LONG_PASSES or more.

    An image counts by its pixels, since the time of a network grows with them.
    """
    passes = 0
    for stage in recipe.stages.values():
        kind = stage_kind(stage)
        found = kind.count_epoch_images(stage, splits, recipe.seeds[0])
        if isinstance(stage, TrainingOptions) and found and (len(recipe.seeds) > 1 or kind.list_rounds(stage)):
            images, batch = found
            passes += kind.count_trainings(stage) * stage.length.count_steps(images // batch) * batch
    weight = (recipe.dataset.image_size / LONG_PASSES_SIDE) ** 2
    return passes * len(recipe.seeds) * weight >= LONG_PASSES


class _SharedStage:
    """The instances of a stage: those that wait, the number of those that other processes run, and what ended it."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.payload = {key: value for key, value in payload.items() if key != "instances"}
        self.waiting = deque[Fields](payload["instances"])
        self.running = 0
        # The time at which this process began its current one, and the seconds that it spent on each of those before.
        self.begun, self.durations = time.monotonic(), list[float]()
        self.end: StageAnswer | None = None

    def note_end(self) -> None:
        """Notes that this process has ended one, and begins the next."""
        now = time.monotonic()
        self.durations.append(now - self.begun)
        self.begun = now

    def estimate_rest(self) -> float:
        """Returns the seconds that one process needs for what waits, if each takes as long as the shortest so far.

        The first one counts without what it spends on its set-up, and if it has not ended, by what it has taken.
        """
        first, *others = self.durations or [time.monotonic() - self.begun]
        return len(self.waiting) * max(min([first - SET_UP_SECONDS, *others]), 0.0)


class SideProcesses:
    """Processes beside this one, each with a thread here that hands it instances.

    `most`: the largest number of them. `tell`: is called with a line when they are started.
    """

    def __init__(self, most: int, tell: Callable[[str], object]) -> None:
        self.most, self.tell = most, tell
        self.changed = threading.Condition()
        self.stage: _SharedStage | None = None
        self.is_closed = self.are_started = False
        self.processes: list[subprocess.Popen[bytes]] = []
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> "SideProcesses":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, payload: dict[str, Any], run_here: Callable[[dict[str, Any]], StageAnswer]) -> StageAnswer:
        """Runs the instances of a payload here and in other processes. Returns what `run_instances` returns.

        `run_here(payload)` runs those that come from an iterator, `payload["instances"]`, in this process. After an
        instance that ends early no other one begins.

        Raises:
            StageFailed: another process met an error that it did not expect.
        """
        stage = _SharedStage(payload)
        first = stage.waiting.popleft()
        ended = threading.Event()
        starter = threading.Thread(target=self._start_for_waiting, args=(stage, ended), daemon=True, name="start")
        with self.changed:
            self.stage = stage
            self.changed.notify_all()
        if not self.are_started:
            starter.start()
        try:
            here = run_here({**stage.payload, "instances": self._take_own(stage, first)})
            while here["stop"] is None and (left := self._wait_for_others(stage)) is not None:
                # The process that had it has ended.
                here = run_here({**stage.payload, "instances": self._take_own(stage, left)})
            end = here if here["stop"] is not None else stage.end
        except BaseException:
            self.close()
            raise
        finally:
            ended.set()
            if starter.ident is not None:
                starter.join()
            with self.changed:
                self.stage = None
        if end is None:
            return here
        self.close()
        if "problem" in end:
            raise StageFailed(end["problem"])
        return end

    def _take_own(self, stage: _SharedStage, fields: Fields | None) -> Iterator[Fields]:
        """Yields instances for this process as long as some wait."""
        while fields is not None:
            yield fields
            with self.changed:
                stage.note_end()
            fields = self._take(stage)

    def _take(self, stage: _SharedStage) -> Fields | None:
        with self.changed:
            return stage.waiting.popleft() if stage.waiting else None

    def _wait_for_others(self, stage: _SharedStage) -> Fields | None:
        """Waits until the others have ended their instances. Returns one that a process has left, if there is any."""
        with self.changed:
            while stage.running and not stage.waiting:
                self.changed.wait(WAIT_S)
        return self._take(stage)

    def _start_for_waiting(self, stage: _SharedStage, ended: threading.Event) -> None:
        """Starts the processes once that takes less than what they would do, unless the stage has ended before."""
        while not ended.wait(WAIT_S):
            with self.changed:
                is_worth = bool(stage.waiting) and stage.estimate_rest() >= WORTHWHILE_SECONDS
            if is_worth:
                self.start()
                return

    def start(self) -> None:
        """Starts the processes, once, as many as there is memory for."""
        with self.changed:
            if self.is_closed or self.are_started:
                return
            self.are_started = True
            own = psutil.Process().memory_info().rss
            most = min(self.most, int(memory.free_memory() / (MEMORY_PER_PROCESS * own)))
            for _ in range(most):
                process = start_module(__spec__.name)
                thread = threading.Thread(target=self._serve, args=(process,), daemon=True, name="seeds")
                self.processes.append(process)
                self.threads.append(thread)
                thread.start()
        if most:
            self.tell(f"seeds and fine-tunings are shared by {most + 1} processes (scale.processes)")

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Gives a process one instance after the other, until it has ended or there is nothing more to do."""
        assert process.stdout is not None
        is_there = bool(process.stdout.readline())
        while is_there:
            with self.changed:
                self.changed.wait_for(lambda: self.is_closed or (self.stage is not None and self.stage.waiting))
                if self.is_closed or self.stage is None:
                    return
                stage = self.stage
                fields = stage.waiting.popleft()
                stage.running += 1
            answer = _ask(process, {**stage.payload, "instances": [fields]})
            is_there = answer is not None and "unfit" not in answer
            if answer is None and not self.is_closed:
                note = f"a process that worked on {_label(fields)} has ended; another one goes on with it"
                with contextlib.suppress(OSError):
                    append_row(Path(fields["folder"]), {"note": note})
            with self.changed:
                stage.running -= 1
                if not is_there:
                    stage.waiting.appendleft(fields)
                elif answer is not None and (answer.get("stop") or "problem" in answer):
                    stage.end = answer
                    stage.waiting.clear()
                self.changed.notify_all()

    def close(self) -> None:
        """Ends the processes, and waits until they are gone."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
        end_processes(self.processes, self.threads)
        self.processes, self.threads = [], []


def _label(fields: Fields) -> str:
    """Returns the stage, the seed and the part that the fields of an instance name."""
    part = f" {fields[PART_KEY]}" if PART_KEY in fields else ""
    return f"{fields['stage']} seed {fields['seed']}{part}"


def _ask(process: subprocess.Popen[bytes], payload: dict[str, Any]) -> StageAnswer | None:
    """Returns the answer of a process to a payload; None if it has ended."""
    assert process.stdout is not None
    is_given = send_bytes(process, json.dumps(payload).encode() + b"\n")
    try:
        answer: StageAnswer = json.loads(process.stdout.readline() if is_given else b"")
    except ValueError:
        return None
    return answer


def _answer_payloads() -> None:
    """Answers the payloads on standard input, until there are no more."""
    with open_answers() as answer:
        _import_compiler()
        answer({"ready": True})
        for line in sys.stdin.buffer:
            answer(_run_payload(json.loads(line)))


def _import_compiler() -> None:
    """Makes an optimiser. The first one imports torch's compiler for a second, in which others can take the work."""
    torch.optim.SGD([torch.zeros(1)], lr=1.0)


def _run_payload(payload: dict[str, Any]) -> StageAnswer:
    try:
        parse_recipe(payload["recipe"])
    except UserError as error:
        # The recipe may name a method that was registered in a notebook.
        return {"unfit": str(error)}
    try:
        return run_instances(payload, on_ray=False, device=torch.device("cpu"))
    except Exception as error:
        traceback.print_exc()
        (fields,) = payload["instances"]
        return {"problem": f"{_label(fields)}: {type(error).__name__}: {one_line(error)}"}


if __name__ == "__main__":
    _answer_payloads()
    # Threads of libraries that wait for something are left where they are.
    os._exit(0)

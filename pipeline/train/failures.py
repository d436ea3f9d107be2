"""Errors of training workers: finds the cause among the errors of all ranks, records them, and detects repeated ones.

A machine that is about to be taken away is one that is known before: a `PreemptionWatch` says when to save the work.

Tests make a worker fail by `FIRSTLIGHT_FAULT="rank=1,step=3,kind=sigkill,once=/path"`, which is read once when a
worker starts. `kind` is raise, hang or sigkill; with `once`, a file that remembers it, the fault happens once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from firstlight.pipeline.errors import StopTraining, UserError, one_line
from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.records import DamagedRecord, RecordShape, read_json_rows
from firstlight.tasks.collective import broadcast_object, rank

# The files in the folder of an instance with one line for each error of a rank.
FAILURE_FILES = "failed-rank*.jsonl"
# The beginning of the note that the training loop adds to an error; the number of steps done follows.
STEP_NOTE_PREFIX = "after step "
# The most characters of the text of an error in `FAILURE_FILES`.
MAX_RECORDED_CHARACTERS = 10_000
FAULT_VARIABLE = "FIRSTLIGHT_FAULT"
# The function that is called after every step with the rank and the number of steps done. Only tests set it.
fault_hook: Callable[[int, int], None] | None = None
# The function that asks whether machines of this training are about to be taken away. It is collective. `launch.py`
# sets it on clusters.
preemption_source: Callable[[], "PreemptionNotice | None"] | None = None
# Seconds between two questions, and the age of a checkpoint after which another one is written while a notice stands.
PREEMPTION_LOOK_S, PREEMPTION_SAVE_S = 5.0, 20.0
MAX_STEPS_BETWEEN_LOOKS = 10_000
# Seconds that a rank which lost contact waits after a notice, until Ray has noticed itself which machine is gone.
PREEMPTION_WAIT_S = 60.0
# True in a process that has received a notice.
_was_noticed = False
SECONDARY_ERROR_TEXTS = (
    "third_party/gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset by peer",
)


@dataclass(frozen=True)
class PreemptionNotice:
    """Machines that are about to be taken away: the number of them, and the ranks that they run."""

    machines: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        what = "a machine is" if self.machines == 1 else f"{self.machines} machines are"
        ranks = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        return f"{what} about to be taken away ({ranks})"


class PreemptionWatch:
    """Looks for a notice every few seconds, after the same steps on all ranks."""

    def __init__(self) -> None:
        self._next, self._looked_at, self._looked_after = 0, time.monotonic(), 0
        self._saved_at = 0.0
        self._seen: PreemptionNotice | None = None

    def find_notice(self, step: int) -> PreemptionNotice | None:
        """Returns the notice for which a checkpoint is due after `step` steps: a new one, or one that still stands
        `PREEMPTION_SAVE_S` seconds after the last checkpoint for it. It is collective.
        """
        if preemption_source is None or step < self._next:
            return None
        now = time.monotonic()
        per_step = (now - self._looked_at) / max(step - self._looked_after, 1)
        steps = min(max(round(PREEMPTION_LOOK_S / max(per_step, 1e-9)), 1), MAX_STEPS_BETWEEN_LOOKS)
        # Clocks and speeds of ranks differ.
        self._next, is_old = broadcast_object((step + steps, now - self._saved_at > PREEMPTION_SAVE_S))
        self._looked_at, self._looked_after = now, step
        global _was_noticed
        found = preemption_source()
        _was_noticed = found is not None
        is_new, self._seen = found != self._seen, found
        if found is None or not (is_new or is_old):
            return None
        self._saved_at = now
        return found


class _FailureShape(RecordShape):
    """An error of a rank."""

    error: str
    notes: list[str]


FAILURE_SHAPE = TypeAdapter(_FailureShape)


def is_secondary(text: str) -> bool:
    """Returns True if the text of an error says only that another rank is gone or does not answer."""
    return any(echo in text for echo in SECONDARY_ERROR_TEXTS)


@contextlib.contextmanager
def record_failures(folder: Path) -> Iterator[None]:
    """Records an error of the block, which is the work of a rank that Ray repeats after a failure. It is collective.

    Raises:
        StopTraining: on all ranks, before the block: one rank has failed twice with the same error after the same
            step, and would a third time.
    """
    repeated = broadcast_object(find_repeated_failure(folder) if rank() == 0 else None)
    if repeated:
        raise StopTraining(f"{folder.name}: {repeated}; it was not tried again")
    try:
        yield
    except (StopTraining, UserError):
        raise
    except Exception as error:
        text = one_line(f"{type(error).__name__}: {error}", MAX_RECORDED_CHARACTERS)
        if not is_secondary(text):
            append_json_line(
                folder / FAILURE_FILES.replace("*", str(rank())),
                {"error": text, "notes": getattr(error, "__notes__", [])},
            )
        elif _was_noticed:
            # Ray counts the first error that it sees, and this one would be a failure. It ends this process meanwhile.
            time.sleep(PREEMPTION_WAIT_S)
        raise


def find_repeated_failure(folder: Path) -> str | None:
    """Describes the error that a rank has failed with twice after the same step. Returns None if there is none.

    A file that no rank has written counts as no failure: rank 0 reads it alone, and must not fail alone.
    """
    for file in sorted(folder.glob(FAILURE_FILES)):
        try:
            rows = read_json_rows(file, FAILURE_SHAPE)
        except DamagedRecord:
            continue
        for row in rows:
            if rows.count(row) > 1:
                who = file.stem.removeprefix("failed-").replace("rank", "rank ")
                return " ".join((who, "failed twice", *row["notes"], "of", row["error"]))
    return None


def delete_failures(folder: Path) -> None:
    """Deletes the records of earlier commands, as the cause may have been removed since."""
    for file in folder.glob(FAILURE_FILES):
        file.unlink()


def describe_cause(failures: Mapping[int, BaseException], workers: int, timeout_s: int) -> str:
    """Returns one line about the errors of some ranks, as Ray reports them.

    It names the first error that is not secondary; if all are, the ranks that did not answer.
    """
    texts = {rank_: _describe_failure(failure) for rank_, failure in failures.items()}
    first = min(texts, key=lambda rank_: (is_secondary(texts[rank_]), rank_))
    line = f"rank {first}: {texts[first]}"
    silent = [str(rank_) for rank_ in range(workers) if rank_ not in failures]
    if not is_secondary(texts[first]) or not silent:
        return line
    return f"no answer from rank {', '.join(silent)} within scale.collective_timeout_s: {timeout_s} ({line})"


def _describe_failure(failure: BaseException) -> str:
    """Returns the last line of the text of an error, which is a traceback if the worker raised it, with the step."""
    lines = str(failure).strip().splitlines() or ["died"]
    step = f" ({lines.pop()})" if len(lines) > 1 and lines[-1].startswith(STEP_NOTE_PREFIX) else ""
    name = type(failure).__name__
    return f"{'' if name == 'UserExceptionWithTraceback' else f'{name}: '}{lines[-1]}{step}"


@contextlib.contextmanager
def fault_from_environment() -> Iterator[None]:
    """Reads FIRSTLIGHT_FAULT, and sets `fault_hook` accordingly while the block runs. It is also a decorator."""
    global fault_hook
    description = os.environ.get(FAULT_VARIABLE)
    fault_hook = _parse_fault(description) if description else None
    try:
        yield
    finally:
        fault_hook = None


def _parse_fault(description: str) -> Callable[[int, int], None]:
    fault = dict(part.split("=", 1) for part in description.split(","))
    place, once = (int(fault["rank"]), int(fault["step"])), Path(fault["once"]) if "once" in fault else None

    def inject_fault(rank_: int, step: int) -> None:
        if (rank_, step) != place or (once is not None and once.exists()):
            return
        if once is not None:
            once.touch()
        if fault["kind"] == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["kind"] == "hang":
            time.sleep(86_400)
        else:
            raise RuntimeError(f"injected fault: {description}")

    return inject_fault


@contextlib.contextmanager
def preemption_from(source: Callable[[], PreemptionNotice | None]) -> Iterator[None]:
    """Lets trainings in the block ask `source`, on all ranks."""
    global preemption_source
    preemption_source = source
    try:
        yield
    finally:
        preemption_source = None

"""Errors of training workers: finds the cause among the errors of all ranks, records them, and detects repeated ones.

Tests make a worker fail by `FIRSTLIGHT_FAULT="rank=1,step=3,kind=sigkill,once=/path"`, which is read once when a
worker starts. `kind` is raise, hang or sigkill; with `once`, a file that remembers it, the fault happens once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from firstlight.pipeline.errors import StopTraining, UserError, one_line
from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.records import DamagedRecord, RecordShape, read_json_rows
from firstlight.tasks.collective import broadcast_object, rank

# In the folder of an instance; one line for each error of the rank.
FAILURE_FILES = "failed-rank*.jsonl"
# Begins the note that the training loop adds to an error; the number of steps done follows.
STEP_NOTE_PREFIX = "after step "
# Of the text of an error in `FAILURE_FILES`.
MAX_RECORDED_CHARACTERS = 10_000
FAULT_VARIABLE = "FIRSTLIGHT_FAULT"
# Called after every step with the rank and the number of steps done. Only tests set it.
fault_hook: Callable[[int, int], None] | None = None
SECONDARY_ERROR_TEXTS = (
    "third_party/gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset by peer",
)


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
    """Records an error of the block, which is the work of a rank that Ray repeats after a failure. Collective.

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
    """Reads FIRSTLIGHT_FAULT, and sets `fault_hook` accordingly while the block runs. Also a decorator."""
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

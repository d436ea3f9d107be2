"""Errors of training workers: which of them is the cause, and whether the same one has come again."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.files import append_json_line
from firstlight.tasks.collective import broadcast_object, rank

FILES = "failed-rank*.jsonl"  # in the folder of an instance: a line for each error of that rank
AFTER = "after step "  # begins the note on an error that says how many steps were made
ECHOES = ("third_party/gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer")


def is_echo(text: str) -> bool:
    """Whether an error says only that another rank is gone or does not answer."""
    return any(echo in text for echo in ECHOES)


@contextlib.contextmanager
def remembered(folder: Path) -> Iterator[None]:
    """Around the work of a rank, which Ray repeats where it fails. Collective.

    Raises:
        StopTraining: on all ranks, before the work: one of them has failed twice in the same way after the same step, as it would a third time.
    """
    told = broadcast_object(repeated(folder) if rank() == 0 else None)
    if told:
        raise StopTraining(f"{folder.name}: {told}; it was not tried again")
    try:
        yield
    except StopTraining:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if not is_echo(text):
            append_json_line(
                folder / FILES.replace("*", str(rank())), {"error": text, "notes": getattr(error, "__notes__", [])}
            )
        raise


def repeated(folder: Path) -> str | None:
    """What a rank has failed of twice, at the same place."""
    for file in sorted(folder.glob(FILES)):
        lines = [line for line in file.read_text("utf-8").splitlines() if line]
        for line in lines:
            if lines.count(line) > 1:
                found = json.loads(line)
                return " ".join(
                    (
                        file.stem.removeprefix("failed-").replace("rank", "rank "),
                        "failed twice",
                        *found["notes"],
                        "of",
                        found["error"],
                    )
                )
    return None


def forget(folder: Path) -> None:
    """Before a new command: what was wrong may have been mended."""
    for file in folder.glob(FILES):
        file.unlink()


def cause(failures: Mapping[int, BaseException], workers: int, timeout_s: int) -> str:
    """The errors of some ranks, as Ray reports them, as one line: the first that is no echo; else who did not answer."""
    texts = {rank_: _last_line(failure) for rank_, failure in failures.items()}
    first = min(texts, key=lambda rank_: (is_echo(texts[rank_]), rank_))
    line = f"rank {first}: {texts[first]}"
    silent = [str(rank_) for rank_ in range(workers) if rank_ not in failures]
    if not is_echo(texts[first]) or not silent:
        return line
    return f"no answer from rank {', '.join(silent)} within scale.collective_timeout_s: {timeout_s} ({line})"


def _last_line(failure: BaseException) -> str:
    """Of its text, which is a traceback where the worker raised; with the step."""
    lines = str(failure).strip().splitlines() or ["died"]
    step = f" ({lines.pop()})" if len(lines) > 1 and lines[-1].startswith(AFTER) else ""
    name = type(failure).__name__
    return f"{'' if name == 'UserExceptionWithTraceback' else f'{name}: '}{lines[-1]}{step}"

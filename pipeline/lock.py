"""Who runs a recipe: a lock on a file in its folder, which goes with the process however that ends."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from firstlight.pipeline.errors import UserError

LOCK = ".lock"


def holder(folder: Path) -> str | None:
    """The process that runs what is in `folder`; None: nobody does. Where no lock was ever taken, nobody does."""
    try:
        with (folder / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "?"
    except OSError:
        return None
    return None


@contextlib.contextmanager
def locked(folder: Path, name: str, patience_s: float = 0.0) -> Iterator[None]:
    """One run of a name at a time; the lock goes with the process, however it ends. It is waited for as long as `patience_s`.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience_s
    with open(folder / LOCK, "a+") as file:
        while not (mine := _taken(file)) and time.monotonic() < end:
            time.sleep(0.5)
        if not mine:
            file.seek(0)
            raise UserError(
                f"name: {name!r} is being run by process {file.read().strip() or '?'}; wait for it, or give another name="
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

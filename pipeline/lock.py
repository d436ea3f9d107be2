"""Who runs a recipe: a lock on a file in its folder, which goes with the process however that ends."""

import fcntl
from pathlib import Path

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

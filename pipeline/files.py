"""Files that are whole or absent, also after a power cut: flushed to the disk first, then renamed."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def temporary_in(folder: Path) -> Path:
    """A fresh name for a file that is not whole yet."""
    return folder / f".{uuid.uuid4().hex}.tmp"


def put_in_place(temporary: Path, file: Path) -> None:
    """Move a written file to its name."""
    _sync(temporary)
    os.replace(temporary, file)
    _sync(file.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk while something is written says which file that was: of a full disk, Python does not tell."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def append_line(path: Path, row: Any) -> None:
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_flushed(path: Path, data: bytes) -> None:
    """Write and flush; not atomic: for files that a manifest makes count later."""
    path.write_bytes(data)
    _sync(path)


def write_atomically(path: Path, data: bytes) -> None:
    temporary = temporary_in(path.parent)
    try:
        with naming(path):
            temporary.write_bytes(data)
            put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1).encode())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

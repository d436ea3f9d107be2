"""Files that are whole or absent, even after a power cut, and locks that end with their process."""

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from firstlight.pipeline.errors import UserError

LOCK_FILE = ".lock"
LOCK_POLL_S = 0.5


@contextlib.contextmanager
def atomic_path(file: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `file`; once it is written, it is flushed to disk and replaces `file`.

    If the block raises, `file` keeps its old content and the temporary file is removed.

    Raises:
        OSError: the disk refused; the error names `file`.
    """
    temporary = temporary_path(file.parent)
    try:
        with name_file_in_errors(file):
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, file)
            _flush_to_disk(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a path beside `folder`; what the block has made there becomes `folder`, which must not exist.

    If the block raises, nothing is left.

    Raises:
        OSError: the disk refused, or another process has made `folder` meanwhile.
    """
    temporary = temporary_path(folder.parent)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_path(folder: Path) -> Path:
    """Returns a fresh path in `folder` for something that is not whole yet."""
    return folder / f".{uuid.uuid4().hex}.tmp"


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Makes an OSError name `path`: Python does not say which file met a full disk, or names a temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def explain_denied_access(path: Path) -> str:
    """Returns a line about a file or folder that this user may not write: its path and its owner."""
    existing = next((one for one in (path, *path.parents) if _is_visible(one)), path)
    try:
        owner = existing.stat().st_uid
    except OSError:
        return f"{path}: cannot be written: permission denied"
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"the user with id {owner}"
    whose = f"{existing} belongs to {name}" if existing != path else f"it belongs to {name}"
    return f"{path}: cannot be written: {whose}; valid: another storage=, or the right to write there"


def _is_visible(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


@contextlib.contextmanager
def refuse_denied_access(path: Path) -> Iterator[None]:
    """Turns a PermissionError of the block into one line.

    Raises:
        UserError: names the file, or `path` if the error names none, and the owner.
    """
    try:
        yield
    except PermissionError as error:
        raise UserError(explain_denied_access(Path(error.filename) if error.filename else path)) from None


def append_json_line(path: Path, row: Any) -> None:
    """Appends `row` to a JSON-lines file."""
    with name_file_in_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_flushed(path: Path, data: bytes) -> None:
    """Writes and flushes `data`. The write is not atomic: for files that a manifest validates later."""
    path.write_bytes(data)
    _flush_to_disk(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the content of `path` by `data`, or leaves it as it was."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Replaces the content of `path` by `value` as JSON, or leaves it as it was."""
    write_atomically(path, json.dumps(value, indent=1).encode())


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive_lock(folder: Path, name: str, timeout_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of `folder`, and writes this process's id into it.

    The kernel releases the lock when the process ends, however it ends. `name` is what the error calls the work;
    `timeout_s` is how long to wait for another process to release the lock.

    Raises:
        UserError: another process holds the lock; the message names its id. It is also raised if the folder or the lock
            belongs to another user; the message then names the file and the user.
    """
    end = time.monotonic() + timeout_s
    with refuse_denied_access(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+")  # noqa: SIM115
    with file:
        while not (acquired := _try_lock(file)) and time.monotonic() < end:
            time.sleep(LOCK_POLL_S)
        if not acquired:
            file.seek(0)
            owner = file.read().strip() or "?"
            raise UserError(f"name: {name!r} is being run by process {owner}; wait for it, or give another name=")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def find_lock_owner(folder: Path) -> str | None:
    """Returns the id of the process that holds the lock of `folder`, "?" if the file does not say, None if nobody holds
    it.
    """
    try:
        with (folder / LOCK_FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "?"
    except OSError:
        return None
    return None


@contextlib.contextmanager
def wait_for_lock(file: Path) -> Iterator[None]:
    """Holds a lock on `file`, which is created; waits as long as another process holds it.

    Raises:
        UserError: the file or its folder belongs to another user; the message names the file and the user.
    """
    with refuse_denied_access(file):
        opened = open(file, "a")  # noqa: SIM115
    with opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

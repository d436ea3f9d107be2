"""The folder of a Ray that a command starts for itself: closed to other users, and removed at the end.

Ray keeps sockets, logs and spilled objects in it, in folders that everybody may write. The path of a socket has at most
107 bytes, so the folder is in the folder for temporary files only if that is short, and otherwise in /tmp.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import exclusive_lock, find_lock_owner

RAY_FOLDER_PREFIX = "fl-ray-"
SHORT_FOLDERS = ("/tmp", "/var/tmp")  # noqa: S108
MAX_SOCKET_PATH_BYTES = 107
# The longest path that Ray adds to its folder: the time, the id of the process, and the name of a socket.
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"
# The path that is added to the folder for temporary files.
LONGEST_FOLDER = f"/{RAY_FOLDER_PREFIX}abcdefgh/r"
# A folder without a lock is that of a killed process, or of one that has made it just now.
STALE_AFTER_S = 60.0
# The time that Ray's processes have to end before their folder is given up, and the pause between attempts.
REMOVAL_TIMEOUT_S, REMOVAL_POLL_S = 10.0, 0.2


@dataclass(frozen=True)
class RayFolder:
    """The folder that Ray gets, and another one for spilled objects if that is to be elsewhere."""

    path: Path
    spilling: Path | None


@contextlib.contextmanager
def make_ray_folder() -> Iterator[RayFolder]:
    """Makes the folder of a local Ray, and removes it, with those that killed processes have left.

    Raises:
        UserError: there is no folder for temporary files that is short enough and can be written; names TMPDIR.
    """
    wanted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    base = _choose_base(wanted)
    _remove_stale_folders(base)
    with contextlib.ExitStack() as stack:
        folder = _make_private_folder(base, stack)
        is_elsewhere = base != wanted and os.access(wanted, os.W_OK | os.X_OK)
        spilling = _make_private_folder(wanted, stack) if is_elsewhere else None
        yield RayFolder(folder / "r", spilling)


def _choose_base(wanted: Path) -> Path:
    """Returns the folder to make Ray's folder in: `wanted`, or a short one if its sockets would have too long paths."""
    candidates = [wanted, *map(Path, SHORT_FOLDERS)]
    short = [base for base in candidates if len(os.fsencode(base)) <= _longest_base()]
    for base in short:
        if os.access(base, os.W_OK | os.X_OK):
            return base
    raise UserError(
        f"TMPDIR: {str(wanted)!r} is not valid for Ray: the paths of its sockets have at most {MAX_SOCKET_PATH_BYTES} "
        f"bytes, and {' and '.join(SHORT_FOLDERS)} cannot be written; valid: a folder that can be written, of at most "
        f"{_longest_base()} bytes"
    )


def _longest_base() -> int:
    return MAX_SOCKET_PATH_BYTES - len(LONGEST_SOCKET) - len(LONGEST_FOLDER)


def _make_private_folder(base: Path, stack: contextlib.ExitStack) -> Path:
    """Makes a folder that only this user can open, locks it, and has `stack` remove it."""
    folder = Path(tempfile.mkdtemp(prefix=RAY_FOLDER_PREFIX, dir=base))
    stack.callback(_remove_folder, folder)
    stack.enter_context(exclusive_lock(folder, folder.name))
    return folder


def _remove_folder(folder: Path) -> None:
    """Removes a folder in which ending processes may still write."""
    end = time.monotonic() + REMOVAL_TIMEOUT_S
    while folder.exists() and time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(REMOVAL_POLL_S)


def _remove_stale_folders(base: Path) -> None:
    """Removes the folders of this user whose processes were killed."""
    for folder in base.glob(f"{RAY_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            is_own = found.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink()
            if is_own and time.time() - found.st_mtime > STALE_AFTER_S and find_lock_owner(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)

"""Checks that a library makes of a section, remembered between processes.

An optimiser is checked by building it, for which torch is imported. A section that has passed is known by a hash of its
content, of the checking code and of the versions of the libraries, and passes without them the next time. A section
that fails is checked each time, so that its error is that of the library.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from firstlight.pipeline.code_cache import hash_sources, locate_cache

CHECKING_LIBRARIES = ("torch", "timm")
# Further sections are checked each time.
MAX_CHECKED_SPECS = 10_000


def check_once(code: Path, content: Any, check: Callable[[], None]) -> None:
    """Calls `check` unless it has passed before for the same content.

    `code`: the file of the check. `content`: JSON values, all that the check depends on. In a process that has torch
    already, the check is always made.
    """
    file, known = _open_passed(code)
    key = hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
    if key in known and "torch" not in sys.modules:
        return
    check()
    if key in known or len(known) >= MAX_CHECKED_SPECS:
        return
    known.add(key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="ascii") as lines:
            lines.write(key + "\n")


@cache
def _open_passed(code: Path) -> tuple[Path, set[str]]:
    """Returns the file of what has passed, a hash on each line, and its content."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in CHECKING_LIBRARIES]
    file = locate_cache() / f"checked-{hash_sources([code, Path(__file__)], *versions)[:32]}.txt"
    try:
        return file, set(file.read_text("ascii").split())
    except (OSError, ValueError):
        return file, set()

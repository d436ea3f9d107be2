"""Facts that take seconds to derive from source code, kept in the user's cache folder.

Each is named by a hash of the files and versions that it follows from, so that it is never out of date: after a change
it is derived again. A folder that cannot be written costs those seconds, nothing else.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.records import read_json_record, write_sealed_json

# The largest number of files of one name: one for each version of the code that was used last.
MAX_CACHED_FILES = 8
FACT_SHAPE = TypeAdapter(dict[str, Any])


def locate_cache() -> Path:
    """Returns the user's cache folder of Firstlight. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else os.path.expanduser("~/.cache")) / "firstlight"


def hash_sources(files: Iterable[Path], *versions: str) -> str:
    """Returns the sha256 of the contents of source files, whatever their order, of Python's version and others."""
    digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256("\n".join([sys.version, *versions, *digests]).encode()).hexdigest()


def read_cached(name: str, key: str) -> dict[str, Any] | None:
    """Returns the fact `name` of the sources with the hash `key`; None if there is none, or its file is damaged."""
    try:
        return read_json_record(_name_file(name, key), FACT_SHAPE)
    except UserError:
        return None


def write_cached(name: str, key: str, fact: dict[str, Any]) -> None:
    """Keeps a fact for later processes, if the folder can be written. The oldest of many are removed."""
    file = _name_file(name, key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed_json(file, fact)
        for old in list_oldest(file.parent.glob(f"{name}-*.json"), MAX_CACHED_FILES):
            old.unlink(missing_ok=True)


def list_oldest(paths: Iterable[Path], kept: int) -> list[Path]:
    """Returns all files or folders but the `kept` ones that were changed last."""
    return sorted(paths, key=_modified_at, reverse=True)[kept:]


def _name_file(name: str, key: str) -> Path:
    return locate_cache() / f"{name}-{key[:32]}.json"


def _modified_at(file: Path) -> float:
    with contextlib.suppress(OSError):
        return file.stat().st_mtime
    return 0.0

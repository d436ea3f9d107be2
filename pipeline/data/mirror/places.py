"""The working folders of storages that are URIs.

A storage has the same URI on every machine, and a working folder on each. A process knows those that it has placed.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from firstlight.pipeline.code_cache import locate_cache
from firstlight.pipeline.data.mirror.bucket import FileSum
from firstlight.pipeline.data.mirror.mirror import CHECKPOINT_FOLDER, Mirror
from firstlight.pipeline.data.sources.files import parse_local_path
from firstlight.pipeline.errors import UserError, describe_os_error
from firstlight.pipeline.records import DamagedRecord

# A folder for working folders, instead of `~/.cache/firstlight/storage`.
CACHE_VARIABLE = "FIRSTLIGHT_STORAGE_CACHE"
# The schemes that can be written, out of those that images can be read from.
STORAGE_SCHEMES = ("az", "gs", "memory", "s3")
# The number of characters of a URI that the name of its working folder shows.
NAME_LENGTH = 60

_mirrors: dict[Path, Mirror] = {}


def place_storage(location: str) -> Path:
    """Returns the folder of a storage: the path itself, or the working folder of a URI, which need not exist.

    Raises:
        ValueError: the URI has a scheme that cannot be written, or names no bucket; names the valid ones.
    """
    scheme, sign, rest = location.partition("://")
    if not sign:
        return Path(location)
    valid = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"
    if scheme != "file" and scheme not in STORAGE_SCHEMES:
        raise ValueError(f"{location!r} cannot be written; valid: a folder, {valid}")
    local = parse_local_path(location)
    if local is not None:
        return local
    parts = [part for part in rest.split("/") if part]
    if rest.startswith("/") or not parts or ".." in parts or "@" in parts[0] or "?" in rest:
        raise ValueError(
            f"{location!r} is no bucket with a prefix; valid: {valid}; credentials are those of the environment"
        )
    uri = f"{scheme}://{'/'.join(parts)}"
    root = locate_working_folder(uri)
    _mirrors.setdefault(root, Mirror(root, uri))
    return root


def locate_working_folder(uri: str) -> Path:
    """Returns the folder on this machine in which the storage `uri` is worked on."""
    wanted = os.environ.get(CACHE_VARIABLE)
    base = Path(os.path.abspath(os.path.expanduser(wanted))) if wanted else locate_cache() / "storage"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", uri)[:NAME_LENGTH]
    return base.resolve() / f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def find_mirror(path: Path) -> Mirror | None:
    """Returns the mirror of the working folder in which a path lies, None for any other path."""
    return next((mirror for root, mirror in _mirrors.items() if path.is_relative_to(root)), None)


def name_location(path: Path) -> str:
    """Returns the URI of a path in a working folder, which is the same on all machines, or else the path."""
    mirror = find_mirror(path)
    return str(path) if mirror is None else mirror.get_location(path)


def find_place(location: str) -> Path:
    """Returns the path on this machine that `name_location` has named on another one."""
    for mirror in _mirrors.values():
        if location == mirror.uri or location.startswith(f"{mirror.uri}/"):
            return place_storage(mirror.uri) / location[len(mirror.uri) + 1 :]
    return Path(location)


@dataclass(frozen=True)
class TravellingPath:
    """A path that means the same on the machine of a process that it is sent to."""

    path: Path

    def __getstate__(self) -> tuple[str, str]:
        return pack_place(self.path)

    def __setstate__(self, state: tuple[str, str]) -> None:
        object.__setattr__(self, "path", unpack_place(state))

    def fetch(self) -> Path:
        """Returns the path, after a download of its unit if it is not on this machine.

        Raises:
            UserError: it cannot be downloaded; names the object or `storage`.
        """
        fetch_if_possible(self.path)
        return self.path


def pack_place(path: Path) -> tuple[str, str]:
    """Returns a path for a process on another machine: the URI of its storage or "", and the path there."""
    mirror = find_mirror(path)
    return ("", str(path)) if mirror is None else (mirror.uri, str(path.relative_to(mirror.root)))


def unpack_place(place: tuple[str, str]) -> Path:
    """Returns the path on this machine of what `pack_place` has returned."""
    uri, path = place
    return place_storage(uri) / path if uri else Path(path)


def find_unit(path: Path) -> Path:
    """Returns the folder of the unit that a path in a working folder belongs to."""
    mirror = find_mirror(path)
    if mirror is None:
        return path
    parts = path.relative_to(mirror.root).parts
    for number, part in enumerate(parts, 1):
        if CHECKPOINT_FOLDER.match(part):
            return mirror.root.joinpath(*parts[:number])
    return mirror.root.joinpath(*parts[:2])


def fetch_unit(folder: Path, salvages: bool = False) -> list[str]:
    """Downloads what a bucket has of a unit and this machine lacks. A unit that is damaged there is left out.

    `salvages`: except for its files that are whole and make nothing count. Returns notes for the user; [] for a folder
    that is in no bucket.

    Raises:
        UserError: the bucket cannot be read; names `storage`.
    """
    mirror = find_mirror(folder)
    if mirror is None:
        return []
    try:
        mirror.fetch(folder, salvages=salvages)
    except DamagedRecord as error:
        return [f"{error}; it is treated as missing, and made again"]
    except OSError as error:
        raise UserError(explain_outage(mirror, error)) from None
    return []


def fetch_if_possible(path: Path) -> None:
    """Downloads the unit of a path. If that fails, what is here has to do: its readers check it.

    Raises:
        UserError: the path is not here either; names the object or `storage`.
    """
    mirror = find_mirror(path)
    if mirror is None:
        return
    problem = mirror.attempt(lambda: _fetch_quietly(mirror, path), force=not path.exists())
    if problem is not None and not path.exists():
        raise UserError(explain_outage(mirror, OSError(5, problem)))


def _fetch_quietly(mirror: Mirror, path: Path) -> None:
    try:
        mirror.fetch(find_unit(path))
    except DamagedRecord:
        if not path.exists():
            raise


def explain_outage(mirror: Mirror, error: OSError, what: str = "read") -> str:
    """Returns one line about a bucket that cannot be read, or `what`."""
    reason = describe_os_error(error)
    return f"storage: {mirror.uri!r} cannot be {what}: {reason}; run it again to continue"


def fetch_missing(file: Path, expected: FileSum) -> None:
    """Downloads a file in a working folder that is not on this machine.

    Raises:
        DamagedRecord, OSError: as `Mirror.fetch_file`.
    """
    mirror = find_mirror(file)
    if mirror is not None:
        mirror.fetch_file(file, expected)


def explain_missing_database(storage: Path) -> str:
    """Returns an error message about a storage in a bucket without `tracking.uri`."""
    return (
        f"storage: {name_location(storage)!r} needs tracking.uri: by default MLflow keeps runs in a database file in "
        "storage, which a bucket cannot hold; valid: tracking.uri=http://host:5000, or sqlite:////path/to/mlflow.db"
    )

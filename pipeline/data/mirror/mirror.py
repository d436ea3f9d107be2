"""Copies units between a working folder and object storage. Every file is compared with its sum when it arrives."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from firstlight.pipeline.data.mirror.bucket import Bucket, FileSum, sum_bytes, sum_file
from firstlight.pipeline.data.mirror.contents import (
    CONTENTS_FILE,
    LAST_FILES,
    Contents,
    is_same,
    order_names,
)
from firstlight.pipeline.data.mirror.unit_records import STATE_FOLDER, UnitRecords, hash_name
from firstlight.pipeline.data.sources.files import read_concurrently
from firstlight.pipeline.errors import describe_os_error
from firstlight.pipeline.records import DamagedRecord

# Checkpoints are units of their own, wherever they lie.
CHECKPOINT_FOLDER = re.compile(r"step-\d{9,}-[0-9a-f]+\Z")
# A file that asks a training of this machine to stop.
UNMIRRORED_FILES = frozenset({"stop", CONTENTS_FILE})
# Larger files are sent in pieces, and read twice if they replace another one.
MAX_BYTES_AT_ONCE = 64 << 20
# The time that nothing is tried again after a failure, where the work can go on.
REST_S = 30.0


@dataclass(frozen=True)
class _FileState:
    """The size and time of a file, which show whether it has changed."""

    size: int
    changed_ns: int


class Mirror:
    """The mirror of the working folder `root` below `uri`. The same units may be used by several processes."""

    def __init__(self, root: Path, uri: str) -> None:
        self.root, self.uri, self.bucket = root, uri, Bucket(uri)
        self.records = UnitRecords(root, self.bucket)
        self._problem, self._failed_at = "", 0.0

    def get_location(self, path: Path) -> str:
        """Returns the URI of a path in the working folder."""
        name = self.get_name(path)
        return f"{self.uri}/{name}" if name != "." else self.uri

    def get_name(self, path: Path) -> str:
        """Returns the name of a path in the working folder, relative to it: that of its unit or object."""
        return path.relative_to(self.root).as_posix()

    def attempt(self, transfer: Callable[[], object], force: bool = False) -> str | None:
        """Calls `transfer`. Returns None, or one line about the failure.

        For some seconds after a failure nothing is tried, unless `force`: work should not wait for each of its files.
        """
        if self._problem and not force and time.monotonic() - self._failed_at < REST_S:
            return self._problem
        try:
            transfer()
        except OSError as error:
            self._problem, self._failed_at = describe_os_error(error), time.monotonic()
            return self._problem
        self._problem = ""
        return None

    # Uploads to object storage

    def push(self, folder: Path) -> None:
        """Uploads what has changed in a unit since the last upload or download.

        Raises:
            OSError: an object cannot be written. The unit there is then as it was, or has files of both states.
        """
        unit = self.get_name(folder)
        with self.records.hold(unit):
            base, states = self.records.read_base(unit), _list_files(folder, recursive=len(Path(unit).parts) > 1)
            if not states or not self._has_changed(unit, base, states):
                return
            remote = self._find_right_sums(unit, self.records.read_contents(unit) or Contents())
            sent = self._send_changed(unit, folder, remote, self._sum_files(folder, base, states))
            # Files that another machine has added stay.
            others = {name: one for name, one in remote.files.items() if name not in base.files and name not in sent}
            noted = {name: {**one, "changed_ns": states[name].changed_ns} for name, one in sent.items()}
            self.records.write_contents(unit, Contents({**others, **sent}), Contents(noted))
            self.bucket.delete(f"{unit}/{name}" for name in remote.files if name not in others and name not in sent)

    def _find_right_sums(self, unit: str, remote: Contents) -> Contents:
        """Returns the record of a unit with the sums that files have which a killed process was replacing."""
        files = dict(remote.files)
        for name in remote.earlier:
            data = self.bucket.read(f"{unit}/{name}")
            if data is not None and remote.accepts(name, sum_bytes(data)):
                files[name] = sum_bytes(data)
            else:
                self.records.damaged.add(f"{unit}/{name}")
        return Contents(files, {}, remote.known)

    def _has_changed(self, unit: str, base: Contents, states: Mapping[str, _FileState]) -> bool:
        if base.files.keys() != states.keys() or any(name.startswith(f"{unit}/") for name in self.records.damaged):
            return True
        return any(not _is_unchanged(base.files[name], state) for name, state in states.items())

    def _sum_files(self, folder: Path, base: Contents, states: Mapping[str, _FileState]) -> dict[str, FileSum]:
        found = {}
        for name, state in states.items():
            known = base.files.get(name)
            is_known = known is not None and _is_unchanged(known, state)
            found[name] = _drop_time(known) if known is not None and is_known else sum_file(folder / name)
        return found

    def _send_changed(
        self, unit: str, folder: Path, remote: Contents, found: Mapping[str, FileSum]
    ) -> dict[str, FileSum]:
        """Uploads the files that differ. Returns the sums of all files, as they were sent."""
        names = [
            name
            for name in order_names(list(found))
            if f"{unit}/{name}" in self.records.damaged
            or name not in remote.files
            or not is_same(remote.files[name], found[name])
        ]
        # A file that is written meanwhile is sent as it is now.
        held = {
            name: (folder / name).read_bytes()
            for name in names
            if name in remote.files and found[name]["bytes"] <= MAX_BYTES_AT_ONCE
        }
        sent = {**found, **{name: sum_bytes(data) for name, data in held.items()}}
        replaced = {name: remote.files[name] for name in names if name in remote.files}
        if replaced:
            both = {**remote.files, **{name: sent[name] for name in replaced}}
            self.records.write_contents(unit, Contents(both, replaced))
        for name in names:
            key = f"{unit}/{name}"
            sent[name] = self.bucket.write(key, held[name]) if name in held else self.send_file(folder, name)
            self.records.damaged.discard(key)
        return sent

    def send_file(self, folder: Path, name: str) -> FileSum:
        """Uploads a file of a unit, which `seal` makes whole. Returns its sum. Raises OSError."""
        return self.bucket.upload(f"{self.get_name(folder)}/{name}", folder / name)

    def seal(self, folder: Path, files: Mapping[str, FileSum]) -> None:
        """Writes the record of a unit whose files were sent by one or several machines. Raises OSError."""
        unit = self.get_name(folder)
        with self.records.hold(unit):
            self.records.write_contents(unit, Contents(files), Contents(files))

    def remove(self, folder: Path) -> None:
        """Removes a unit, and all units in it, from object storage; their records first. Raises OSError."""
        unit = self.get_name(folder)
        names = self.bucket.list_names(unit)
        self.bucket.delete(sorted(names, key=lambda name: not name.endswith(f"/{CONTENTS_FILE}")))
        shutil.rmtree(self.records.find_base_file(unit).parent, ignore_errors=True)

    def remove_file(self, file: Path) -> None:
        """Removes one file of a unit from object storage; the record first. Raises OSError, DamagedRecord."""
        unit = self.get_name(file.parent)
        with self.records.hold(unit):
            remote, base = self.records.read_contents(unit), self.records.read_base(unit)
            if remote is None or file.name not in remote.files:
                return
            kept = Contents(_drop_name(remote.files, file.name), _drop_name(remote.earlier, file.name))
            self.records.write_contents(unit, kept, Contents(_drop_name(base.files, file.name)))
            self.bucket.delete([f"{unit}/{file.name}"])

    # Downloads from object storage

    def fetch(self, folder: Path, only: Collection[str] = (), salvages: bool = False) -> bool:
        """Downloads what object storage has of a unit and the working folder lacks, or has of an earlier version.

        `only`: the names of the files that are needed; (): all. `salvages`: of a unit with a damaged object, the other
        files are taken, except those that make it count. Returns False if object storage does not have the unit.

        Raises:
            DamagedRecord: an object or the record is not what was written; the unit is not taken. Names the object.
            OSError: object storage cannot be read.
        """
        unit = self.get_name(folder)
        with self.records.hold(unit):
            remote, base = self.records.read_contents(unit), self.records.read_base(unit)
            if remote is None:
                return False
            is_newer, noted, wanted = remote.known[0] not in base.known, dict[str, FileSum](), list[str]()
            for name, expected in remote.files.items():
                file = folder / name
                if not file.is_file():
                    wanted += [name] if not only or name in only else []
                elif not is_newer:
                    noted[name] = base.files.get(name, expected)
                elif (found := sum_file(file)) and is_same(found, expected):
                    noted[name] = {**found, "changed_ns": file.stat().st_mtime_ns}
                elif not only or name in only:
                    wanted.append(name)
            noted |= self._take_files(unit, folder, remote, wanted, salvages)
            if wanted or is_newer:
                self.records.write_base(unit, Contents(noted, {}, remote.known))
        return True

    def fetch_file(self, file: Path, expected: FileSum) -> None:
        """Downloads one file of a unit, whose sum is known, if it is not here.

        Raises:
            DamagedRecord: there is no such object, or it is not what was written. Names it.
            OSError: object storage cannot be read.
        """
        if file.is_file():
            return
        name = self.get_name(file.parent)
        with self.records.hold(f"{name}/{file.name}"):
            if not file.is_file():
                self._take_files(name, file.parent, Contents({file.name: expected}), [file.name])

    def _take_files(
        self, unit: str, folder: Path, remote: Contents, names: list[str], salvages: bool = False
    ) -> dict[str, FileSum]:
        """Downloads files, compares them with their sums, and puts them in place once all are there."""
        if not names:
            return {}
        key = f"{unit}/{names[0]}" if len(names) == 1 else unit
        staging = self.root / STATE_FOLDER / "staging" / hash_name(f"{key} {os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            files = {name: staging / str(number) for number, name in enumerate(names)}
            sums = read_concurrently(lambda name: self._receive_file(unit, name, files[name], remote), names)
            received = dict(zip(names, sums, strict=True))
            found = {name: one for name, one in received.items() if isinstance(one, dict)}
            damage = [one for one in received.values() if isinstance(one, DamagedRecord)]
            if damage:
                found = {name: one for name, one in found.items() if salvages and name not in LAST_FILES}
            for name in order_names(list(found)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(files[name], folder / name)
            for problem in damage:
                raise problem
            return {name: {**one, "changed_ns": (folder / name).stat().st_mtime_ns} for name, one in found.items()}
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _receive_file(self, unit: str, name: str, file: Path, remote: Contents) -> FileSum | DamagedRecord:
        """Downloads a file. Returns its sum, or the error about what is wrong with it."""
        key, problem = f"{unit}/{name}", "is missing"
        # The download is tried twice, as the connection may have changed the file.
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                found = self.bucket.download(key, file)
                if remote.accepts(name, found):
                    return found
                problem = f"has {found['bytes']} bytes, or other ones, than its record says"
        self.records.damaged.add(key)
        return DamagedRecord(f"{self.bucket.get_location(key)}: is damaged: it {problem}")

    def list_units(self, below: Path) -> list[Path]:
        """Returns the folders of all units that object storage has below a folder, itself included, sorted.

        Raises:
            OSError: object storage cannot be read.
        """
        unit = self.get_name(below)
        names = self.bucket.list_names("" if unit == "." else unit)
        return sorted(self.root / Path(name).parent for name in names if Path(name).name == CONTENTS_FILE)

    def forget_units(self, below: Path, existing: Collection[Path]) -> None:
        """Forgets what was uploaded of units below a folder that object storage does not have any more."""
        for file in self.records.find_base_file(self.get_name(below)).parent.rglob("base.json"):
            if self.root / file.parent.relative_to(self.root / STATE_FOLDER / "units") not in existing:
                file.unlink(missing_ok=True)

    def list_files(self, below: Path) -> list[str]:
        """Returns the names of all objects below a folder, relative to it, sorted. Raises OSError."""
        unit = self.get_name(below)
        return [name.removeprefix(f"{unit}/") for name in self.bucket.list_names(unit)]

    def has_unit(self, folder: Path) -> bool:
        """Returns True if object storage has a unit. Raises OSError."""
        return self.bucket.read(f"{self.get_name(folder)}/{CONTENTS_FILE}") is not None

    def measure_unit(self, folder: Path) -> int:
        """Returns the bytes of the files of a unit, 0 if its record is damaged. Raises OSError."""
        with contextlib.suppress(DamagedRecord):
            contents = self.records.read_contents(self.get_name(folder)) or Contents()
            return sum(int(one["bytes"]) for one in contents.files.values())
        return 0


def _drop_name(files: Mapping[str, FileSum], name: str) -> dict[str, FileSum]:
    return {other: one for other, one in files.items() if other != name}


def _drop_time(known: FileSum) -> FileSum:
    return {"bytes": known["bytes"], "sha256": known["sha256"]}


def _is_unchanged(known: FileSum, state: _FileState) -> bool:
    return bool((known["bytes"], known.get("changed_ns")) == (state.size, state.changed_ns))


def _list_files(folder: Path, recursive: bool) -> dict[str, _FileState]:
    """Returns the files of a unit, without hidden and temporary ones, and without units in it."""
    found = {}
    for place, below, names in os.walk(folder):
        here = Path(place)
        below[:] = sorted(
            name for name in below if recursive and not name.startswith(".") and not CHECKPOINT_FOLDER.match(name)
        )
        for name in names:
            file = here / name
            if name.startswith(".") or name.endswith(".tmp") or name in UNMIRRORED_FILES:
                continue
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found[file.relative_to(folder).as_posix()] = _FileState(status.st_size, status.st_mtime_ns)
    return found

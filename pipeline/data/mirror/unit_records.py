"""The records of units on both sides: in object storage, and those that note here what both sides had last."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from firstlight.pipeline.data.mirror.bucket import Bucket
from firstlight.pipeline.data.mirror.contents import CONTENTS_FILE, Contents, hash_record, parse_contents
from firstlight.pipeline.files import wait_for_lock, write_atomically
from firstlight.pipeline.records import DamagedRecord

# The folder in the working folder for the state that both sides had last, for locks, and for files on their way.
STATE_FOLDER = ".mirror"


class UnitRecords:
    """Reads and writes the records of the units of the working folder `root` and of `bucket`."""

    def __init__(self, root: Path, bucket: Bucket) -> None:
        self.root, self.bucket = root, bucket
        # Names of objects that were not what their record says; they are sent again, and not taken.
        self.damaged: set[str] = set()

    def read_contents(self, unit: str) -> Contents | None:
        """Returns the record of a unit, None if there is none. Raises DamagedRecord, OSError."""
        name = f"{unit}/{CONTENTS_FILE}"
        data = self.bucket.read(name)
        if data is None:
            return None
        if name in self.damaged:
            # It was found damaged before, and is written again.
            with contextlib.suppress(DamagedRecord):
                return parse_contents(data, self.bucket.get_location(name))
            return None
        try:
            return parse_contents(data, self.bucket.get_location(name))
        except DamagedRecord:
            self.damaged.add(name)
            raise

    def write_contents(self, unit: str, contents: Contents, after: Contents | None = None) -> None:
        """Writes the record of a unit, and then notes `after` here; None: what was noted before stays right."""
        name, data, before = f"{unit}/{CONTENTS_FILE}", contents.dump(), self.read_base(unit)
        known = hash_record(data)
        # First, so that this machine takes the record for its own, also if the process is killed in between.
        self.write_base(unit, Contents(before.files, {}, (*before.known[-1:], known)))
        self.bucket.write(name, data)
        self.damaged.discard(name)
        self.write_base(unit, Contents((after or before).files, {}, (known,)))

    def find_base_file(self, unit: str) -> Path:
        """Returns the file here that notes what both sides of a unit had last."""
        return self.root / STATE_FOLDER / "units" / unit / "base.json"

    def read_base(self, unit: str) -> Contents:
        """Returns what both sides of a unit had last; nothing if it was not noted, or the note is damaged."""
        file = self.find_base_file(unit)
        # Both sides are compared file by file if the record is missing or damaged.
        with contextlib.suppress(OSError, DamagedRecord):
            return parse_contents(file.read_bytes(), str(file))
        return Contents()

    def write_base(self, unit: str, contents: Contents) -> None:
        """Notes what both sides of a unit have now."""
        file = self.find_base_file(unit)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, contents.dump(is_here=True))

    @contextlib.contextmanager
    def hold(self, unit: str) -> Iterator[None]:
        """Holds the lock of a unit on this machine."""
        folder = self.root / STATE_FOLDER / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(folder / hash_name(unit)):
            yield


def hash_name(name: str) -> str:
    """Returns 24 hexadecimal digits, a name for a lock or a folder of files on their way."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]

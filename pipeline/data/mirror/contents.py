"""The record of a unit: the names, sizes and sha256 of its files, and a sum of itself.

    contents.json    {"files": {name: {"bytes", "sha256"}}, "earlier": {...}, "sum"}

In object storage it is written after the files that it names; without it a unit does not exist. A file that replaces
another one has two sums that are right while it is written: the new one in `files`, the old one in `earlier`. So a
process may be killed at any moment, and the unit is whole with either.

The same record in the working folder notes what both sides had after the last upload or download, with the time at
which each file was changed ("changed_ns"), so that nothing is read or sent twice. It also notes the sums of the records
there that this machine knows ("known"): another one was written by another machine since.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pydantic import Field, TypeAdapter, field_validator

from firstlight.pipeline.data.mirror.bucket import FileSum
from firstlight.pipeline.records import Count, HexDigest, RecordShape, parse_record, seal_record

CONTENTS_FILE = "contents.json"
# Files that make a folder count for other code: they are written last, and removed first.
LAST_FILES = ("published.json", "manifest.json", "result.json")


class _SumShape(RecordShape):
    """The size and the sum of a file."""

    bytes: Count
    sha256: HexDigest


class _ContentsShape(RecordShape):
    """The record of a unit."""

    files: dict[str, _SumShape]
    earlier: dict[str, _SumShape] = Field(default_factory=dict)
    known: list[HexDigest] = Field(default_factory=list)

    @field_validator("files", "earlier")
    @classmethod
    def _check_names(cls, files: dict[str, _SumShape]) -> dict[str, _SumShape]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or name.startswith("."):
                raise ValueError(f"{name!r} is no file of the folder")
        return files


_CONTENTS = TypeAdapter(_ContentsShape)


@dataclass(frozen=True)
class Contents:
    """The files of a unit by name. `earlier`: sums that are right, too, of files that were being replaced.

    `known`: of a record in object storage, its own sha256; of one here, those of the records there that are known.
    """

    files: Mapping[str, FileSum] = field(default_factory=dict)
    earlier: Mapping[str, FileSum] = field(default_factory=dict)
    known: tuple[str, ...] = ()

    def dump(self, is_here: bool = False) -> bytes:
        """Returns the record, which is read back by `parse_contents`. `is_here`: with `known`."""
        raw = {"files": dict(self.files), "earlier": dict(self.earlier)} | ({"known": self.known} if is_here else {})
        return json.dumps(seal_record(raw), indent=1).encode()

    def accepts(self, name: str, found: FileSum) -> bool:
        """Returns True if a file has a sum that is right."""
        return any(name in known and is_same(known[name], found) for known in (self.files, self.earlier))


def parse_contents(data: bytes, where: str) -> Contents:
    """Returns the record of a unit. `where` names it in errors.

    Raises:
        DamagedRecord: it is not what was written.
    """
    found = parse_record(data, _CONTENTS, where)
    return Contents(found["files"], found.get("earlier", {}), tuple(found.get("known", ())) or (hash_record(data),))


def hash_record(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_same(one: FileSum, other: FileSum) -> bool:
    return bool(one["bytes"] == other["bytes"] and one["sha256"] == other["sha256"])


def order_names(names: list[str]) -> list[str]:
    """Returns the names of files in the order in which they are written."""
    return sorted(names, key=lambda name: (_rank_name(name), name))


def _rank_name(name: str) -> int:
    """Returns 0 for data, and more for files that make others count; those of the unit itself are last."""
    path = PurePosixPath(name)
    if path.name not in LAST_FILES:
        return 0
    return 1 + LAST_FILES.index(path.name) + (len(LAST_FILES) if len(path.parts) == 1 else 0)

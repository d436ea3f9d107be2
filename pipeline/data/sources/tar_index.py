"""The index of a tar archive: its images and labels, listed in one pass that keeps no pixels.

Nothing is written to disk, so the name of a member is no path that could lead anywhere. conventions/tar_samples.py says
which members are one sample.
"""

import contextlib
import gzip
import json
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, NamedTuple, cast

from firstlight.pipeline.data.sources.conventions.column_names import LABEL_COLUMNS, find_column
from firstlight.pipeline.data.sources.conventions.folder_layout import SYSTEM_FOLDERS
from firstlight.pipeline.data.sources.conventions.image_signatures import (
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    SIGNATURE_BYTES,
    find_ending,
    is_image_start,
)
from firstlight.pipeline.data.sources.files import MAX_IMAGE_BYTES, Files, describe_too_large
from firstlight.pipeline.errors import one_line

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# The largest .cls or .json
MAX_LABEL_BYTES = 1 << 20
# Fields of a .json that are named where the label is not among them
MAX_JSON_FIELDS = 20
# The exceptions that tarfile raises for a damaged archive. RecursionError: a thousand headers in a row, each of which
# extends the next one
ARCHIVE_ERRORS = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    RecursionError,
)
EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# The largest long name or pax header: tarfile reads them as a whole, and they state their own size
MAX_HEADER_BYTES = 1 << 20
# Fields of a label besides the one that the config names, as the library `webdataset` has them, the first counts
LABEL_FIELDS = ("cls", "class", "target", "json")
MemberKind = Literal["image", "label", "refused"]


class TarMember(NamedTuple):
    """A member of an archive: an image, a label, or one that is refused for `reason`."""

    kind: MemberKind
    name: str
    # Offset of the content in the archive, decompressed if it is compressed, and its size, in bytes
    offset: int = 0
    size: int = 0
    label: str | None = None
    # The reason why a label cannot be read
    reason: str | None = None


@dataclass
class ArchiveListing:
    """The members of an archive, and how many were left out, by reason."""

    members: list[TarMember] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    # Fields of .json files that lack the field of the label
    json_fields: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def open_archive(files: Files, name: str) -> Iterator[BinaryIO]:
    """Yields the archive, decompressed if it is compressed: a forward seek then costs as much as reading."""
    with files.open(name) as file:
        if name.lower().endswith(".tar"):
            yield file
        else:
            with gzip.open(file) as plain:
                yield cast(BinaryIO, plain)


def index_archive(files: Files, name: str, label_column: str | None) -> ArchiveListing:
    """Lists the members in their order. If the archive is damaged, the last one says so."""
    listing = ArchiveListing()
    try:
        with open_archive(files, name) as stream:
            _read_members(_TarReader(fileobj=stream, mode="r"), listing, label_column)
    except ARCHIVE_ERRORS as error:
        reason = f"the archive is damaged, what follows is lost: {one_line(error) or type(error).__name__}"
        listing.members.append(TarMember("refused", "", reason=reason))
    return listing


class _TarHeader(tarfile.TarInfo):
    """A header that records in the archive whether its end mark was read, as tarfile also takes damage for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_TarHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            cast(_TarReader, tar).has_end_mark = type(error).__name__ == "EOFHeaderError"
            raise

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in EXTENDED_HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes (at most {MAX_HEADER_BYTES})")
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]


class _TarReader(tarfile.TarFile):
    tarinfo = _TarHeader
    has_end_mark = False


def _read_members(tar: _TarReader, listing: ArchiveListing, label_column: str | None) -> None:
    """Lists the members of an archive.

    Raises:
        One of ARCHIVE_ERRORS: the archive is damaged.
    """
    while (member := tar.next()) is not None:
        # Otherwise, tarfile keeps all members in memory
        tar.members = []  # type: ignore[attr-defined]
        name = member.name.encode("utf-8", "backslashreplace").decode()
        if member.isdir():
            continue
        *folders, file = name.split("/")
        if file.startswith(".") or any(folder.lower() in SYSTEM_FOLDERS for folder in folders):
            listing.left_out["hidden or of the system"] += 1
        elif "." not in file:
            listing.left_out["no ending"] += 1
        elif not member.isreg() or member.issparse():
            reason = f"is no plain file but {_describe_member(member)}"
            listing.members.append(TarMember("refused", name, reason=reason))
        else:
            _list_member(tar, member, name, listing, label_column)
    if not tar.has_end_mark:
        raise tarfile.ReadError(f"no end mark, but damage at byte {tar.offset}")


def _list_member(
    tar: _TarReader, member: tarfile.TarInfo, name: str, listing: ArchiveListing, label_column: str | None
) -> None:
    """Adds a plain file: an image by its ending or its first bytes, a label by its field, or counts it."""
    ending = find_ending(name)
    is_label = label_column is not None and ending[1:] in (label_column.lower(), *LABEL_FIELDS)
    is_image = ending in IMAGE_SUFFIXES and not is_label
    if is_label and label_column is not None:
        listing.members.append(_read_member_label(tar, member, name, listing, label_column))
    elif is_image or (ending not in OTHER_SUFFIXES and is_image_start(_read_member_start(tar, member))):
        if member.size > MAX_IMAGE_BYTES:
            listing.members.append(TarMember("refused", name, reason=describe_too_large(member.size)))
            return
        # The last byte can be read, so the archive is not cut within the image
        _read_at(tar, member.offset_data + member.size - 1, min(member.size, 1))
        listing.members.append(TarMember("image", name, member.offset_data, member.size))
    else:
        listing.left_out[ending] += 1


def _read_member_start(tar: _TarReader, member: tarfile.TarInfo) -> bytes:
    return _read_at(tar, member.offset_data, min(member.size, SIGNATURE_BYTES))


def _read_at(tar: _TarReader, offset: int, size: int) -> bytes:
    """Returns `size` bytes from `offset` on.

    Raises:
        ReadError: the archive ends before.
    """
    tar.fileobj.seek(offset)  # type: ignore[union-attr]
    data = tar.fileobj.read(size)  # type: ignore[union-attr]
    if len(data) < size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _describe_member(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname.encode('utf-8', 'backslashreplace').decode()[:100]}"
    if member.issparse():
        return "a sparse file"
    return "a device or pipe" if member.isdev() else f"of the type {member.type!r}"


def _read_member_label(
    tar: _TarReader, member: tarfile.TarInfo, name: str, listing: ArchiveListing, label_column: str
) -> TarMember:
    base = posixpath.basename(member.name)
    if member.size > MAX_LABEL_BYTES:
        return TarMember("label", name, reason=f"the label of {base!a} is larger than {MAX_LABEL_BYTES} bytes")
    data = _read_at(tar, member.offset_data, member.size)
    try:
        if find_ending(name) == ".json" and label_column != "json":
            return TarMember("label", name, label=_parse_json_label(data, label_column, listing.json_fields))
        return TarMember("label", name, label=_clean_label(data.decode().strip()))
    except (ValueError, RecursionError):
        return TarMember("label", name, reason=f"the label of {base!a} cannot be read")


def _parse_json_label(data: bytes, field: str, other_fields: Counter[str]) -> str | None:
    """Returns the value of `field`, or of the only usual field of a label if `field` is one; None without such a field.

    Raises:
        ValueError: the data is no JSON, or the label is neither text nor a number or a truth value.
    """
    record = json.loads(data)
    if not isinstance(record, dict):
        return None
    found = find_column(field, list(record), "dataset.label_column", LABEL_COLUMNS)
    value = record.get(found.name) if found else None
    if found is None or found.note:
        other_fields.update([found.note] if found else list(record)[:MAX_JSON_FIELDS])
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(value)
    return None if value is None else _clean_label(str(value))


def _clean_label(label: str) -> str | None:
    return label.encode("utf-8", "backslashreplace").decode() or None

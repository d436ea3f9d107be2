"""The index of a tar archive of samples, made in one pass that keeps no pixels.

Nothing is written to disk, so the name of a member is no path that could lead anywhere. `a/b/0001.jpg`, `a/b/0001.cls`
and `a/b/0001.json` are one sample with the key `a/b/0001`: the name up to the first dot of its last part.
"""

import contextlib
import gzip
import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, cast

from firstlight.pipeline.data.sources.files import MAX_IMAGE_BYTES, Files, describe_too_large
from firstlight.pipeline.data.sources.source import IMAGE_SUFFIXES
from firstlight.pipeline.errors import one_line

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# The largest .cls or .json
MAX_LABEL_BYTES = 1 << 20
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
NO_IMAGE_REASON, SECOND_IMAGE_REASON, TWO_LABELS_REASON = (
    "the sample has no image",
    "is a second image of its sample",
    "the sample has two labels",
)


class TarEntry(NamedTuple):
    """An image of an archive, or a member that is none, for `reason`."""

    member: str
    # Offset of the content in the archive, decompressed if it is compressed, and its size, in bytes
    offset: int
    size: int
    label: str | None = None
    reason: str | None = None


@dataclass
class TarSample:
    """The members of an archive with one key."""

    images: list[TarEntry] = field(default_factory=list)
    # Extension -> label
    labels: dict[str, str | None] = field(default_factory=dict)
    reason: str | None = None
    # The name of one of its members, by which messages name the sample
    member: str = ""


@contextlib.contextmanager
def open_archive(files: Files, name: str) -> Iterator[BinaryIO]:
    """Yields the archive, decompressed if it is compressed: a forward seek then costs as much as reading."""
    with files.open(name) as file:
        if name.lower().endswith(".tar"):
            yield file
        else:
            with gzip.open(file) as plain:
                yield cast(BinaryIO, plain)


def index_archive(files: Files, name: str, label_column: str | None) -> list[TarEntry]:
    """Returns the samples in the order of their first member, then the members that are refused.

    If the archive is damaged, the last entry says so.
    """
    samples: dict[str, TarSample] = {}
    refused: list[TarEntry] = []
    try:
        with open_archive(files, name) as stream:
            _read_members(_TarReader(fileobj=stream, mode="r"), samples, refused, label_column)
    except ARCHIVE_ERRORS as error:
        reason = f"the archive is damaged, what follows is lost: {one_line(error) or type(error).__name__}"
        refused.append(TarEntry("", 0, 0, None, reason))
    return [entry for sample in samples.values() for entry in _resolve_sample(sample, label_column)] + refused


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


def _read_members(
    tar: _TarReader, samples: dict[str, TarSample], refused: list[TarEntry], label_column: str | None
) -> None:
    """Collects the samples and the refused members of an archive.

    Raises:
        One of ARCHIVE_ERRORS: the archive is damaged.
    """
    while (member := tar.next()) is not None:
        # Otherwise, tarfile keeps all members in memory
        tar.members = []  # type: ignore[attr-defined]
        name = member.name.encode("utf-8", "backslashreplace").decode()
        key, extension = _split_name(name)
        if member.isdir() or not key or not extension:
            continue
        if not member.isreg() or member.issparse():
            refused.append(TarEntry(name, 0, 0, None, f"is no plain file but {_describe_member(member)}"))
        elif extension.endswith(IMAGE_SUFFIXES) and member.size > MAX_IMAGE_BYTES:
            refused.append(TarEntry(name, 0, 0, None, describe_too_large(member.size)))
        elif extension.endswith(IMAGE_SUFFIXES):
            # The last byte can be read, so the archive is not cut within the image
            _read_at(tar, member.offset_data + member.size - 1, min(member.size, 1))
            samples.setdefault(key, TarSample()).images.append(TarEntry(name, member.offset_data, member.size))
        elif label_column is not None and extension in (".cls", ".json", f".{label_column}"):
            _read_member_label(tar, member, extension, samples.setdefault(key, TarSample(member=name)), label_column)
    if not tar.has_end_mark:
        raise tarfile.ReadError(f"no end mark, but damage at byte {tar.offset}")


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


def _split_name(name: str) -> tuple[str, str]:
    """Returns the key and the extension of a member, from the first dot on; ("", "") for hidden files."""
    folder, _, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return (posixpath.join(folder, stem), f".{rest.lower()}" if dot else "") if stem else ("", "")


def _describe_member(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname.encode('utf-8', 'backslashreplace').decode()[:100]}"
    if member.issparse():
        return "a sparse file"
    return "a device or pipe" if member.isdev() else f"of the type {member.type!r}"


def _read_member_label(
    tar: _TarReader, member: tarfile.TarInfo, extension: str, sample: TarSample, label_column: str
) -> None:
    label: str | None = None
    if member.size > MAX_LABEL_BYTES:
        sample.reason = f"the label of {posixpath.basename(member.name)!a} is larger than {MAX_LABEL_BYTES} bytes"
        return
    data = _read_at(tar, member.offset_data, member.size)
    try:
        label = _parse_json_label(data, label_column) if extension == ".json" else _clean_label(data.decode().strip())
    except (ValueError, RecursionError):
        sample.reason = f"the label of {posixpath.basename(member.name)!a} cannot be read"
    if sample.labels.setdefault(extension, label) != label:
        sample.reason = TWO_LABELS_REASON


def _parse_json_label(data: bytes, field: str) -> str | None:
    """Returns the value of `field`; None if it is missing.

    Raises:
        ValueError: the data is no JSON, or the label is neither text nor an integer.
    """
    record = json.loads(data)
    value = record.get(field) if isinstance(record, dict) else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise ValueError(value)
    return None if value is None else _clean_label(str(value))


def _clean_label(label: str) -> str | None:
    return label.encode("utf-8", "backslashreplace").decode() or None


def _resolve_sample(sample: TarSample, label_column: str | None) -> Iterator[TarEntry]:
    """Yields the images of a sample with its label. The second image, and a sample without an image, get a reason."""
    order = (f".{label_column}", ".cls", ".json")
    label = next((sample.labels[extension] for extension in order if sample.labels.get(extension) is not None), None)
    if not sample.images and label is not None:
        yield TarEntry(sample.member, 0, 0, label, NO_IMAGE_REASON)
    for k, image in enumerate(sample.images):
        yield image._replace(label=label, reason=SECOND_IMAGE_REASON if k else sample.reason)

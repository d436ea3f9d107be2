"""What a tar archive of samples holds, found in one pass that keeps no pixels. Nothing is ever written to disk, so a member's name is only a name.

`a/b/0001.jpg`, `a/b/0001.cls` and `a/b/0001.json` are one sample of the key `a/b/0001`: the name up to the first dot of its last part.
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

from firstlight.pipeline.data.sources.files import MAX_BYTES, Files, too_large
from firstlight.pipeline.data.sources.source import SUFFIXES

ARCHIVES = (".tar", ".tar.gz", ".tgz")
MAX_LABEL = 1 << 20  # bytes of a .cls or .json
# What tarfile lets out over a broken archive; RecursionError: a header that stands for the one behind it, a thousand times over
BROKEN = (
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
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MAX_HEADER = (
    1 << 20
)  # bytes of a long name, or of a pax header: tarfile reads them whole, and they state their size themselves
NO_IMAGE, SECOND, AMBIGUOUS = "the sample has no image", "is a second image of its sample", "the sample has two labels"


class Found(NamedTuple):
    """An image of an archive, or what should have been one and is not, for `reason`."""

    member: str
    offset: int  # of its bytes in the archive (a compressed one: once decompressed)
    size: int
    label: str | None = None
    reason: str | None = None


@dataclass
class Sample:
    images: list[Found] = field(default_factory=list)
    labels: dict[str, str | None] = field(default_factory=dict)  # extension -> label
    reason: str | None = None
    member: str = ""  # one of its members, to name it by


@contextlib.contextmanager
def opened(files: Files, name: str) -> Iterator[BinaryIO]:
    """The archive, decompressed on the way where it is compressed: a seek forwards then costs what it passes over."""
    with files.open(name) as file:
        if name.lower().endswith(".tar"):
            yield file
        else:
            with gzip.open(file) as plain:
                yield cast(BinaryIO, plain)


def contents(files: Files, name: str, label_column: str | None) -> list[Found]:
    """Samples in the order of their first member, then members that are refused, then at most one entry for the archive itself, if it is broken."""
    samples: dict[str, Sample] = {}
    refused: list[Found] = []
    try:
        with opened(files, name) as stream:
            _read(_Tar(fileobj=stream, mode="r"), samples, refused, label_column)
    except BROKEN as error:
        refused.append(
            Found(
                "",
                0,
                0,
                None,
                f"the archive is damaged, what follows is lost: {' '.join(str(error).split()) or type(error).__name__}",
            )
        )
    return [found for sample in samples.values() for found in _settled(sample, label_column)] + refused


class _Header(tarfile.TarInfo):
    """Tells the archive when its end mark has been read: tarfile takes damage within an archive for its end, too."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            cast(_Tar, tar).ended = type(error).__name__ == "EOFHeaderError"
            raise

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes (at most {MAX_HEADER})")
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]


class _Tar(tarfile.TarFile):
    tarinfo = _Header
    ended = False


def _read(tar: _Tar, samples: dict[str, Sample], refused: list[Found], label_column: str | None) -> None:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
        name = member.name.encode("utf-8", "backslashreplace").decode()
        key, extension = _split(name)
        if member.isdir() or not key or not extension:
            continue
        if not member.isreg() or member.issparse():
            refused.append(Found(name, 0, 0, None, f"is no plain file but {_kind(member)}"))
        elif extension.endswith(SUFFIXES) and member.size > MAX_BYTES:
            refused.append(Found(name, 0, 0, None, too_large(member.size)))
        elif extension.endswith(SUFFIXES):
            _at(tar, member.offset_data + member.size - 1, min(member.size, 1))  # all of it is there
            samples.setdefault(key, Sample()).images.append(Found(name, member.offset_data, member.size))
        elif label_column is not None and extension in (".cls", ".json", f".{label_column}"):
            _label(tar, member, extension, samples.setdefault(key, Sample(member=name)), label_column)
    if not tar.ended:
        raise tarfile.ReadError(f"no end mark, but damage at byte {tar.offset}")


def _at(tar: _Tar, offset: int, size: int) -> bytes:
    """Raises ReadError where the archive ends before."""
    tar.fileobj.seek(offset)  # type: ignore[union-attr]
    data = tar.fileobj.read(size)  # type: ignore[union-attr]
    if len(data) < size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _split(name: str) -> tuple[str, str]:
    """Key and extension, from the first dot on; ("", "") for hidden files."""
    folder, _, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return (posixpath.join(folder, stem), f".{rest.lower()}" if dot else "") if stem else ("", "")


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname.encode('utf-8', 'backslashreplace').decode()[:100]}"
    return (
        "a sparse file"
        if member.issparse()
        else "a device or pipe"
        if member.isdev()
        else f"of the type {member.type!r}"
    )


def _label(tar: _Tar, member: tarfile.TarInfo, extension: str, sample: Sample, label_column: str) -> None:
    label: str | None = None
    if member.size > MAX_LABEL:
        sample.reason = f"the label of {posixpath.basename(member.name)!a} is larger than {MAX_LABEL} bytes"
        return
    data = _at(tar, member.offset_data, member.size)
    try:
        label = _from_json(data, label_column) if extension == ".json" else _word(data.decode().strip())
    except (ValueError, RecursionError):
        sample.reason = f"the label of {posixpath.basename(member.name)!a} cannot be read"
    if sample.labels.setdefault(extension, label) != label:
        sample.reason = AMBIGUOUS


def _from_json(data: bytes, field: str) -> str | None:
    """Raises ValueError for what is no JSON, or a label that is neither text nor integer."""
    record = json.loads(data)
    value = record.get(field) if isinstance(record, dict) else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise ValueError(value)
    return None if value is None else _word(str(value))


def _word(label: str) -> str | None:
    return label.encode("utf-8", "backslashreplace").decode() or None


def _settled(sample: Sample, label_column: str | None) -> Iterator[Found]:
    order = (f".{label_column}", ".cls", ".json")
    label = next((sample.labels[extension] for extension in order if sample.labels.get(extension) is not None), None)
    if not sample.images and label is not None:
        yield Found(sample.member, 0, 0, label, NO_IMAGE)
    for k, image in enumerate(sample.images):
        yield image._replace(label=label, reason=SECOND if k else sample.reason)

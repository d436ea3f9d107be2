"""Files below a root: a folder on disk, or whatever a URI leads to (object storage, a web server).

A client of fsspec's is used where it is installed (s3fs, gcsfs), else the one that pyarrow brings; credentials come from the environment.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

import pyarrow as pa

SCHEMES = ("file", "gs", "http", "https", "memory", "s3")
VERSIONS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "Last-Modified",
    "created",
)
ATTEMPTS = 3  # at a remote file: what is left out for a hiccup of the network would stay out of the store for good
AT_ONCE = 16  # requests
MAX_BYTES = (
    1 << 29
)  # of one encoded image, wherever it is: it is read as a whole. 64 million pixels of 16 bits take 384 MB
Listed = tuple[
    bytes, int, int
]  # relative path, bytes, and what changes with the file: its modification time in ns, or a hash of its version
T = TypeVar("T")


class Files(ABC):
    """Names are relative to the root, with slashes. All methods raise OSError, with `filename` and `strerror`, over what cannot be read."""

    @abstractmethod
    def names(self) -> list[str]:
        """Of the files directly below the root, sorted, without hidden ones."""

    @abstractmethod
    def facts(self, name: str) -> Listed: ...

    @abstractmethod
    def where(self, name: str = "") -> str:
        """Path or URI, to tell the user."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Seekable."""

    def open_arrow(self, name: str) -> pa.NativeFile:
        """As `open`, for pyarrow's readers."""
        return pa.PythonFile(self.open(name), "r")

    @abstractmethod
    def read(self, name: bytes) -> bytes:
        """Of a file at any depth. On disk, a link is followed only if it stays below the root, and nothing but files is read."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Local(Files):
    root: Path

    def names(self) -> list[str]:
        return sorted(file.name for file in self.root.iterdir() if not file.name.startswith("."))

    def facts(self, name: str) -> Listed:
        found = (self.root / name).stat()
        return os.fsencode(name), found.st_size, found.st_mtime_ns

    def where(self, name: str = "") -> str:
        return str(self.root / name)

    def open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")

    def open_arrow(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self.root / name))

    def read(self, name: bytes) -> bytes:
        root = os.fsencode(self.root)
        file = os.path.join(root, name)
        if not below(root, file):
            raise OSError("link leaves the root")
        return read_file(file)

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()


@dataclass(frozen=True)
class Remote(Files):
    root: str  # a URI without a slash at its end

    def names(self) -> list[str]:
        fs, top = _client(self.root)
        with _told(self.root):
            infos = fs.ls(top, detail=True)
        found = [str(info["name"])[len(top) :].lstrip("/") for info in infos if info["type"] == "file"]
        return sorted(name for name in found if name and not name.startswith("."))

    def find(self) -> list[Listed]:
        """All files below the root, at any depth; [] where there is none, or no root."""
        fs, top = _client(self.root)
        with _told(self.root):
            found = {
                str(path): info for path, info in fs.find(top, detail=True).items() if str(path).startswith(f"{top}/")
            }
            if any(info.get("size") is None for info in found.values()):  # web servers list names only
                found = dict(zip(found, at_once(lambda path: _again(lambda: fs.info(path)), list(found)), strict=True))
        return [_listed(path[len(top) + 1 :], info) for path, info in found.items()]

    def facts(self, name: str) -> Listed:
        fs, path = _client(self.where(name))
        with _told(self.where(name)):
            return _listed(name, _again(lambda: fs.info(path)))

    def where(self, name: str = "") -> str:
        return f"{self.root}/{name}" if name else self.root

    def open(self, name: str) -> BinaryIO:
        fs, path = _client(self.where(name))
        with _told(self.where(name)):
            return cast(
                BinaryIO, io.BufferedReader(_Steady(_again(lambda: fs.open(path, "rb")), self.where(name)), 2**20)
            )

    def read(self, name: bytes) -> bytes:
        where = self.where(os.fsdecode(name))
        fs, path = _client(where)
        with _told(where):
            data, size = _again(lambda: _fetched(fs, path))
        if size > MAX_BYTES:
            raise OSError(too_large(size))
        return data

    def exists(self, name: str) -> bool:
        fs, path = _client(self.where(name))
        with _told(self.where(name)):
            return bool(_again(lambda: fs.exists(path)))


def local_path(location: str) -> Path | None:
    """A path, or a file:// URI, as an absolute path; None: a URI of elsewhere.

    Raises:
        ValueError: its scheme is none of `SCHEMES`.
    """
    scheme, sign, rest = location.partition("://")
    if not sign or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return Path(os.path.abspath(os.path.expanduser(location)))
    if scheme not in SCHEMES:
        raise ValueError(
            f"{location!r}: {scheme}:// is unknown; valid: a path, or {', '.join(f'{name}://' for name in SCHEMES)}"
        )
    return Path(os.path.abspath(unquote("/" + rest.partition("/")[2]))) if scheme == "file" else None


def below(root: bytes, path: bytes) -> bool:
    """Whether `path` is the root or inside of it, behind all links."""
    return os.path.join(os.path.realpath(path), b"").startswith(os.path.join(os.path.realpath(root), b""))


def read_file(file: bytes) -> bytes:
    """Raises OSError for what is no file, as a pipe or a device would never end, and for one that is too large to be an image."""
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise OSError("is no file but a pipe, socket or device")
    if found.st_size > MAX_BYTES:
        raise OSError(too_large(found.st_size))
    with open(file, "rb") as opened:
        return opened.read()


def too_large(size: int) -> str:
    return f"has {size} bytes (at most {MAX_BYTES})"


def at_once(read: Callable[[Any], T], places: Sequence[Any]) -> Iterator[T]:
    """`read` of each, in order, `AT_ONCE` at a time: the results of as many are in memory."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, len(places), AT_ONCE):
            yield from pool.map(read, places[first : first + AT_ONCE])


def fingerprint(listed: Iterable[Listed]) -> str:
    found = hashlib.sha256()
    for path, size, changed in listed:
        found.update(b"%s\0%d\0%d\0" % (path, size, changed))
    return found.hexdigest()


def text(path: bytes) -> str:
    """Valid UTF-8, whatever the bytes."""
    return os.fsdecode(path).encode("utf-8", "backslashreplace").decode()


@dataclass
class _Steady(io.RawIOBase):
    """A remote file whose reads are repeated where they fail, and fail with OSError."""

    file: Any
    uri: str

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _told(self.uri):
            return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        place = self.file.tell()
        with _told(self.uri):
            data = _again(lambda: (self.file.seek(place), self.file.read(len(buffer)))[1])
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _client(uri: str) -> tuple[Any, str]:
    """The client of a URI, and the path as that client has it."""
    scheme, _, rest = uri.partition("://")
    with _told(uri):
        fs = _connect(scheme, rest.partition("/")[0] if scheme in ("s3", "gs") else "")
    return fs, str(fs._strip_protocol(uri if scheme not in ("s3", "gs") else rest)).rstrip("/")


@functools.lru_cache(maxsize=16)
def _connect(scheme: str, bucket: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        from fsspec.implementations.arrow import ArrowFSWrapper

        return ArrowFSWrapper(_of_pyarrow(f"{scheme}://{bucket}"))


def _of_pyarrow(uri: str) -> Any:
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(uri)[0]


def _again(read: Callable[[], T]) -> T:
    for attempt in range(1, ATTEMPTS):
        with contextlib.suppress(Exception):
            return read()
        time.sleep(0.2 * 4**attempt)
    return read()


def _fetched(fs: Any, path: str) -> tuple[bytes, int]:
    """A file and its size; nothing of one that is known to be too large. The clients of s3fs, gcsfs and the web can ask for a range: one request."""
    size = -1 if fs.async_impl else int(fs.info(path)["size"] or 0)
    data = b"" if size > MAX_BYTES else cast(bytes, fs.cat_file(path, end=MAX_BYTES + 1 if size < 0 else None))
    return data, max(size, len(data))


@contextlib.contextmanager
def _told(uri: str) -> Iterator[None]:
    """Each client has exceptions of its own; here they all are OSError."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(2, "No such file or directory", uri) from None
    except Exception as error:
        raise OSError(5, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", uri) from None


def _listed(name: str, info: dict[str, Any]) -> Listed:
    version = next((str(info[key]) for key in VERSIONS if info.get(key) is not None), "")
    size = -1 if info.get("size") is None else int(info["size"])
    return (
        name.encode("utf-8", "surrogateescape"),
        size,
        int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "big"),
    )

"""The files below a URI: object storage, a web server, or the memory of the process.

A client of fsspec is used if one is installed for the scheme (s3fs, gcsfs, adlfs, huggingface_hub), else the client of
pyarrow for s3:// and gs://. Credentials come from the environment.
"""

import contextlib
import functools
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, cast

from firstlight.pipeline.data.sources.files import (
    MAX_IMAGE_BYTES,
    FileFacts,
    Files,
    ReadResult,
    describe_too_large,
    read_concurrently,
)
from firstlight.pipeline.errors import one_line

# The keys under which the clients give the version of a file; the first that is set counts. Google's generation is that
# of the content, and its ETag changes with the storage class, too.
VERSION_KEYS = (
    *("generation", "ETag", "etag", "md5Hash", "mtime"),
    *("LastModified", "last_modified", "updated", "Last-Modified", "created"),
)
# A read is repeated, as an image that is left out because the network failed for a moment is missing in the store for
# good
READ_ATTEMPTS = 3
READ_BUFFER_BYTES = 1 << 20
# The time for which pyarrow repeats a request to Google's storage
PYARROW_RETRY_S = 30
# Schemes whose client comes with an extra of Firstlight
CLIENT_EXTRAS = {"az": "azure", "hf": "hf"}
# The attributes of exceptions in which the clients give the status of an answer
STATUS_KEYS = ("code", "status", "status_code")
# A listing of these does not change while a process runs, as the path has the commit
PINNED_SCHEMES = ("hf",)


class MissingClient(ImportError):
    """No client is installed for a scheme. The text names the extra that has one."""


@dataclass(frozen=True)
class RemoteFiles(Files):
    """The files below a URI."""

    # A URI without a slash at its end
    root: str

    def list_names(self) -> list[str]:
        fs, top = find_client(self.root)
        with raise_os_error(self.root):
            infos = fs.ls(top, detail=True)
        names = [str(info["name"])[len(top) :].lstrip("/") for info in infos if info["type"] == "file"]
        return sorted(name for name in names if name and not name.startswith("."))

    def list_all(self) -> list[FileFacts]:
        """Returns all files below the root, at any depth; [] if the root is empty or missing."""
        fs, top = find_client(self.root)
        with raise_os_error(self.root):
            listing = [(str(path), info) for path, info in fs.find(top, detail=True).items()]
            # A folder that was made in the console of a bucket is an object whose name ends so
            infos = {path: info for path, info in listing if path.startswith(f"{top}/") and not path.endswith("/")}
            # Web servers list names only
            if any(info.get("size") is None for info in infos.values()):
                details = read_concurrently(lambda path: read_with_retries(lambda: fs.info(path)), list(infos))
                infos = dict(zip(infos, details, strict=True))
        return [parse_remote_facts(path[len(top) + 1 :], info) for path, info in infos.items()]

    def get_facts(self, name: str) -> FileFacts:
        fs, path = find_client(self.get_location(name))
        with raise_os_error(self.get_location(name)):
            return parse_remote_facts(name, read_with_retries(lambda: fs.info(path)))

    def get_location(self, name: str = "") -> str:
        return f"{self.root}/{name}" if name else self.root

    def open(self, name: str) -> BinaryIO:
        uri = self.get_location(name)
        fs, path = find_client(uri)
        with raise_os_error(uri):
            file = _RetryingFile(read_with_retries(lambda: fs.open(path, "rb")), uri)
            return cast(BinaryIO, io.BufferedReader(file, READ_BUFFER_BYTES))

    def read(self, name: bytes) -> bytes:
        uri = self.get_location(os.fsdecode(name))
        fs, path = find_client(uri)
        with raise_os_error(uri):
            data, size = read_with_retries(lambda: _fetch_file(fs, path))
        if size > MAX_IMAGE_BYTES:
            raise OSError(describe_too_large(size))
        return data

    def read_part(self, name: bytes, offset: int, size: int) -> bytes:
        uri = self.get_location(os.fsdecode(name))
        fs, path = find_client(uri)
        with raise_os_error(uri):
            data = read_with_retries(lambda: _read_range(fs, path, offset, offset + size))
        # Some clients and servers ignore the range
        return data if len(data) <= size else data[offset : offset + size]

    def list_tree(self) -> list[str]:
        names = [os.fsdecode(path) for path, _, _ in self.list_all()]
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def exists(self, name: str) -> bool:
        fs, path = find_client(self.get_location(name))
        with raise_os_error(self.get_location(name)):
            return bool(read_with_retries(lambda: fs.exists(path)))


@dataclass
class _RetryingFile(io.RawIOBase):
    """A remote file whose failed reads are repeated. If they keep failing, they raise OSError."""

    file: Any
    uri: str

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with raise_os_error(self.uri):
            return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        position = self.file.tell()
        with raise_os_error(self.uri):
            data = read_with_retries(lambda: (self.file.seek(position), self.file.read(len(buffer)))[1])
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def find_client(uri: str) -> tuple[Any, str]:
    """Returns the client for a URI, and the path in the notation of that client."""
    scheme, _, rest = uri.partition("://")
    with raise_os_error(uri):
        fs = _connect_client(scheme, rest.partition("/")[0] if scheme in ("s3", "gs") else "")
    return fs, str(fs._strip_protocol(uri if scheme not in ("s3", "gs") else rest)).rstrip("/")


@functools.lru_cache(maxsize=16)
def _connect_client(scheme: str, bucket: str) -> Any:
    import fsspec

    if scheme == "gs" and (logger := logging.getLogger("gcsfs")).level == logging.NOTSET:
        # It logs each failure with a stack trace, besides the exception
        logger.setLevel(logging.CRITICAL)
    try:
        return fsspec.filesystem(scheme, use_listings_cache=scheme in PINNED_SCHEMES)
    except ImportError:
        if scheme in CLIENT_EXTRAS:
            raise MissingClient(
                f"{scheme}:// needs an extra: pip install 'firstlight[{CLIENT_EXTRAS[scheme]}]'"
            ) from None
        from fsspec.implementations.arrow import ArrowFSWrapper

        return ArrowFSWrapper(_open_pyarrow_filesystem(f"{scheme}://{bucket}"))


def _open_pyarrow_filesystem(uri: str) -> Any:
    from pyarrow.fs import FileSystem

    # Otherwise a request without credentials ends after a quarter of an hour
    limits = f"?retry_limit_seconds={PYARROW_RETRY_S}" if uri.startswith("gs://") else ""
    return FileSystem.from_uri(f"{uri}{limits}")[0]


def read_with_retries(read: Callable[[], ReadResult]) -> ReadResult:
    """Returns `read()`, which is repeated if it fails. A file that does not exist is none of the failures."""
    for attempt in range(1, READ_ATTEMPTS):
        try:
            return read()
        except FileNotFoundError:
            raise
        except Exception:
            time.sleep(0.2 * 4**attempt)
    return read()


def _read_range(fs: Any, path: str, start: int | None, end: int | None) -> bytes:
    """Returns the bytes of a file in a range; b"" if the file ends before it."""
    try:
        return cast(bytes, fs.cat_file(path, start=start, end=end))
    except Exception as error:
        # Google's storage and some web servers refuse a range behind the end, and any range of a file without a byte
        if all(getattr(error, key, 0) != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE for key in STATUS_KEYS):
            raise
    return b""


def _fetch_file(fs: Any, path: str) -> tuple[bytes, int]:
    """Returns the content and the size of a file; the content is not fetched if the size is known to be too large."""
    # The asynchronous clients (s3fs, gcsfs, the web) can ask for a range of bytes, which needs one request instead of
    # two
    size = -1 if fs.async_impl else int(fs.info(path)["size"] or 0)
    data = b""
    if size <= MAX_IMAGE_BYTES:
        data = _read_range(fs, path, None, MAX_IMAGE_BYTES + 1 if size < 0 else None)
    return data, max(size, len(data))


@contextlib.contextmanager
def raise_os_error(uri: str) -> Iterator[None]:
    """Turns the exceptions of the clients, which each have their own, into OSError."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(2, "No such file or directory", uri) from None
    except MissingClient as error:
        raise OSError(5, str(error), uri) from None
    except Exception as error:
        raise OSError(5, f"{type(error).__name__}: {one_line(error)}", uri) from None


def parse_remote_facts(name: str, info: dict[str, Any]) -> FileFacts:
    """Returns the facts of a file, given what a client tells of it: its size, and its version under one of the keys."""
    version = next((str(info[key]) for key in VERSION_KEYS if info.get(key) is not None), "")
    size = -1 if info.get("size") is None else int(info["size"])
    version_hash = int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "big")
    return name.encode("utf-8", "surrogateescape"), size, version_hash

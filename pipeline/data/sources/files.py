"""The files below a root: the contract `Files`, and its implementation for a folder on disk.

remote_files.py implements it for URIs.
"""

import contextlib
import functools
import hashlib
import os
import re
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import pyarrow as pa

URI_SCHEMES = ("az", "file", "gs", "hf", "http", "https", "memory", "s3")
MAX_CONCURRENT_READS = 16
# Seconds that a read waits for the storage from which it pays to have threads wait. Each read of theirs costs 0.03 to
# 0.15 ms, as they wait for the interpreter.
NOTABLE_WAIT_S = 1e-4
# The most rounds of MAX_CONCURRENT_READS reads by threads between two that the calling thread makes as a trial.
MAX_THREADED_ROUNDS = 16
# The largest encoded image, of any source, as it is read as a whole. 64 million pixels of 16 bits take 384 MB.
MAX_IMAGE_BYTES = 1 << 29
# Relative path, size in bytes, and a number that changes with the content: the modification time in ns, or a hash of
# the version that a remote store gives
FileFacts = tuple[bytes, int, int]
ReadResult = TypeVar("ReadResult")


class Files(ABC):
    """The files below a root. Names are relative to it, with slashes.

    All methods raise OSError, with `filename` and `strerror`, if something cannot be read.
    """

    @abstractmethod
    def list_names(self) -> list[str]:
        """Returns the sorted names of the files directly below the root, without hidden ones."""

    @abstractmethod
    def get_facts(self, name: str) -> FileFacts: ...

    @abstractmethod
    def get_location(self, name: str = "") -> str:
        """Returns the path or URI of a file, or of the root, for messages."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Opens a file as a stream of bytes that can seek."""

    def open_arrow(self, name: str) -> pa.NativeFile:
        """Opens a file for the readers of pyarrow."""
        return pa.PythonFile(self.open(name), "r")

    @abstractmethod
    def read(self, name: bytes) -> bytes:
        """Returns the content of an image file at any depth.

        On disk, a link is followed only if its target is below the root, and only regular files are read.

        Raises:
            OSError: the file cannot be read, is larger than `MAX_IMAGE_BYTES`, or is a link that leaves the root.
        """

    @abstractmethod
    def read_part(self, name: bytes, offset: int, size: int) -> bytes:
        """Returns up to `size` bytes of a file at any depth, from `offset` on; links as with `read`."""

    @abstractmethod
    def list_tree(self) -> list[str]:
        """Returns the sorted names of all files at any depth, without hidden files and folders."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...


@dataclass(frozen=True)
class LocalFiles(Files):
    """The files below a folder on disk. With `follow_links`, links may leave the folder."""

    root: Path
    follow_links: bool = False

    def list_names(self) -> list[str]:
        return sorted(file.name for file in self.root.iterdir() if not file.name.startswith("."))

    def get_facts(self, name: str) -> FileFacts:
        status = (self.root / name).stat()
        return os.fsencode(name), status.st_size, status.st_mtime_ns

    def get_location(self, name: str = "") -> str:
        return str(self.root / name)

    def open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")

    def open_arrow(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self.root / name))

    def read(self, name: bytes) -> bytes:
        return read_image_file(self._find_file(name))

    def _find_file(self, name: bytes) -> bytes:
        file = os.path.join(os.fsencode(self.root), name)
        if not self.follow_links and not _is_inside(self._resolved_root, file):
            raise OSError("link leaves the root")
        return file

    @functools.cached_property
    def _resolved_root(self) -> bytes:
        return os.path.realpath(os.fsencode(self.root))

    def read_part(self, name: bytes, offset: int, size: int) -> bytes:
        return self.read_blocks(name, (offset,), size)

    def read_blocks(self, name: bytes, offsets: Iterable[int], size: int) -> bytes:
        """Returns up to `size` bytes from each of `offsets` on, joined; the file is opened once."""
        file = self._find_file(name)
        _check_regular(os.stat(file))
        found = []
        with open(file, "rb") as opened:
            for offset in offsets:
                opened.seek(offset)
                found.append(opened.read(size))
        return b"".join(found)

    def list_tree(self) -> list[str]:
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = os.path.relpath(folder, self.root)
            found += [os.path.join(below if below != "." else "", n) for n in names if not n.startswith(".")]
        return sorted(found)

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()


def parse_local_path(location: str) -> Path | None:
    """Returns a path or a file:// URI as an absolute path; None if `location` is a URI of another scheme.

    Raises:
        ValueError: the scheme is none of `URI_SCHEMES`.
    """
    scheme, sign, rest = location.partition("://")
    if not sign or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return Path(os.path.abspath(os.path.expanduser(location)))
    if scheme not in URI_SCHEMES:
        schemes = ", ".join(f"{name}://" for name in URI_SCHEMES)
        raise ValueError(f"{location!r}: {scheme}:// is unknown; valid: a path, or {schemes}")
    return Path(os.path.abspath(unquote("/" + rest.partition("/")[2]))) if scheme == "file" else None


def is_below(root: bytes, path: bytes) -> bool:
    """Returns True if `path`, with all links resolved, is the root or inside it."""
    return _is_inside(os.path.realpath(root), path)


def _is_inside(resolved_root: bytes, path: bytes) -> bool:
    return os.path.join(os.path.realpath(path), b"").startswith(os.path.join(resolved_root, b""))


def read_image_file(file: bytes) -> bytes:
    """Returns the content of a file on disk.

    Raises:
        OSError: it cannot be read, is a pipe or a device, which would never end, or is larger than `MAX_IMAGE_BYTES`.
    """
    status = os.stat(file)
    _check_regular(status)
    if status.st_size > MAX_IMAGE_BYTES:
        raise OSError(describe_too_large(status.st_size))
    with open(file, "rb") as opened:
        return opened.read()


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError("is no file but a pipe, socket or device")


def describe_too_large(size: int) -> str:
    return f"has {size} bytes (at most {MAX_IMAGE_BYTES})"


def read_concurrently(read: Callable[[Any], ReadResult], items: Sequence[Any]) -> Iterator[ReadResult]:
    """Yields `read(item)` for each item, in order. They are few, large or far away; for others there is `read_many`.

    `MAX_CONCURRENT_READS` calls run at a time, and at most as many results are in memory.
    """
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        for first in range(0, len(items), MAX_CONCURRENT_READS):
            yield from pool.map(read, items[first : first + MAX_CONCURRENT_READS])


def read_many(read: Callable[[Any], ReadResult], items: Sequence[Any]) -> Iterator[ReadResult]:
    """Yields `read(item)` for each of many small items, in order.

    This thread reads them as long as the storage answers at once, as for files that are in memory: threads would take
    four times as long, most of it in wait for the interpreter. After a read that had to wait, threads make the next
    ones, as `read_concurrently`: more and more of them, as long as trials have to wait.
    """
    done, rounds = 0, 1
    with contextlib.ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        while done < len(items):
            begun, busy = time.perf_counter(), time.thread_time()
            result = read(items[done])
            waited = time.perf_counter() - begun - (time.thread_time() - busy)
            done += 1
            yield result
            if waited < NOTABLE_WAIT_S:
                rounds = max(rounds // 2, 1)
                continue
            pool = pool or stack.enter_context(ThreadPoolExecutor(MAX_CONCURRENT_READS))
            for _ in range(rounds):
                yield from pool.map(read, items[done : done + MAX_CONCURRENT_READS])
                done += MAX_CONCURRENT_READS
            rounds = min(2 * rounds, MAX_THREADED_ROUNDS)


def hash_facts(facts: Iterable[FileFacts]) -> str:
    """Returns the SHA-256 of a list of files, in hexadecimal: the fingerprint of a source."""
    digest = hashlib.sha256()
    for path, size, changed in facts:
        digest.update(b"%s\0%d\0%d\0" % (path, size, changed))
    return digest.hexdigest()


def decode_path(path: bytes) -> str:
    """Returns a path as valid UTF-8; bytes that are none are escaped with backslashes."""
    return os.fsdecode(path).encode("utf-8", "backslashreplace").decode()

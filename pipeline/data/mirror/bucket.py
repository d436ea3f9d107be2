"""The objects below a URI, with the clients, credentials and retries that sources of images have."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from firstlight.pipeline.data.sources.files import ReadResult
from firstlight.pipeline.data.sources.remote_files import find_client, raise_os_error, read_with_retries

CHUNK_BYTES = 8 << 20
# The size and the sha256 of an object or a file, as records have them.
FileSum = dict[str, Any]


class Bucket:
    """The objects below a URI. Names are relative to it, with slashes. All methods raise OSError, with the URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def get_location(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object, None if there is none."""
        try:
            data: bytes = self._call(name, lambda fs, path: read_with_retries(lambda: fs.cat_file(path)))
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes) -> FileSum:
        """Writes an object, which exists once it is whole."""
        self._change(name, lambda fs, path: fs.pipe_file(path, data))
        return sum_bytes(data)

    def upload(self, name: str, file: Path) -> FileSum:
        """Writes a file as an object, in pieces. Returns the sum of what was sent."""

        def send(fs: Any, path: str) -> FileSum:
            digest, size = hashlib.sha256(), 0
            with file.open("rb") as source, _open_whole(fs, path) as target:
                while piece := source.read(CHUNK_BYTES):
                    target.write(piece)
                    digest.update(piece)
                    size += len(piece)
            return {"bytes": size, "sha256": digest.hexdigest()}

        return self._change(name, send)

    def download(self, name: str, file: Path) -> FileSum:
        """Writes an object to a file. Returns its sum.

        Raises:
            FileNotFoundError: there is no such object.
        """

        def receive(fs: Any, path: str) -> FileSum:
            digest, size = hashlib.sha256(), 0
            with fs.open(path, "rb") as source, file.open("wb") as target:
                while piece := source.read(CHUNK_BYTES):
                    target.write(piece)
                    digest.update(piece)
                    size += len(piece)
                target.flush()
                os.fsync(target.fileno())
            return {"bytes": size, "sha256": digest.hexdigest()}

        return self._call(name, lambda fs, path: read_with_retries(lambda: receive(fs, path)))

    def list_names(self, below: str = "") -> list[str]:
        """Returns the sorted names of all objects below a name, at any depth; [] if there are none."""

        def find(fs: Any, path: str) -> list[str]:
            found = (str(one) for one in fs.find(path))
            return sorted(one[len(path) + 1 :] for one in found if one.startswith(f"{path}/"))

        names = self._call(below, lambda fs, path: read_with_retries(lambda: find(fs, path)))
        return [f"{below}/{name}" if below else name for name in names]

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, in order. One that does not exist is none of the errors."""
        for name in names:
            try:
                self._call(name, lambda fs, path: fs.rm_file(path))
            except FileNotFoundError:
                continue

    def _call(self, name: str, use: Callable[[Any, str], ReadResult]) -> ReadResult:
        uri = self.get_location(name).rstrip("/")
        fs, path = find_client(uri)
        with raise_os_error(uri):
            return use(fs, path)

    def _change(self, name: str, use: Callable[[Any, str], ReadResult]) -> ReadResult:
        """Calls a client for a write: where an object cannot be made, it says that no file was found."""
        try:
            return self._call(name, use)
        except FileNotFoundError as error:
            raise OSError(5, "the bucket does not exist", error.filename) from None


@contextlib.contextmanager
def _open_whole(fs: Any, path: str) -> Iterator[Any]:
    """Opens an object for writing. If the block fails, none is made, by clients of fsspec."""
    from fsspec.spec import AbstractBufferedFile

    with fs.open(path, "wb") as target:
        try:
            yield target
        except BaseException:
            # Closing it would make an object of what was written. Parts that were sent are left to expire: a request to
            # remove them would wait for a connection that may be what failed.
            if isinstance(target, AbstractBufferedFile):
                target.closed = True
            raise


def sum_bytes(data: bytes) -> FileSum:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sum_file(file: Path) -> FileSum:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return {"bytes": opened.tell(), "sha256": digest.hexdigest()}

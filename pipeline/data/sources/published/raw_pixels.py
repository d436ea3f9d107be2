"""Sources whose images are published as raw pixels: rows of one length in binary files.

Each image becomes a PNG, which loses nothing.
"""

import gzip
import io
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.sources.source import Record, Source, SourceFiles
from firstlight.pipeline.errors import UserError, describe_os_error

# Raised for a file that was removed, or whose compressed bytes are damaged
PIXEL_READ_ERRORS = (OSError, EOFError, ValueError, zlib.error)
# Level of zlib: takes a third of the time of the default 6 for 3 % more bytes
PNG_LEVEL = 3


@dataclass(frozen=True)
class PixelFile:
    """A file that should hold `count` images, and may end before.

    In a binary file, `start` bytes are followed by rows of `skip` bytes and pixels.
    """

    # Relative to the root
    name: str
    count: int
    start: int = 0
    skip: int = 0


@dataclass(frozen=True)
class PixelSource(Source):
    """The images of `files`, laid end to end."""

    root: Path
    files: tuple[PixelFile, ...]

    def list_files(self) -> SourceFiles:
        return SourceFiles(LocalFiles(self.root), [file.name.encode() for file in self.files], self.fingerprint)

    @abstractmethod
    def _read_pixels(self, file: PixelFile, rows: list[int]) -> Iterator[np.ndarray | None]:
        """Yields (H, W, 3) or (H, W) uint8 for each of the ascending `rows`; None if the file ends before the row does.

        Raises:
            One of PIXEL_READ_ERRORS: the file cannot be read.
        """

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        ends = np.cumsum([file.count for file in self.files])
        owners = np.searchsorted(ends, indices, side="right")
        for k in np.unique(owners).tolist():
            file, owned = self.files[k], indices[owners == k]
            rows = (owned - (ends[k] - file.count)).tolist()
            for row, label, (data, reason) in zip(
                rows, self.labels[owned].tolist(), self._encode_rows(file, rows), strict=True
            ):
                yield Record(f"{file.name}#{row}", data, label, reason)

    def _encode_rows(self, file: PixelFile, rows: list[int]) -> Iterator[tuple[bytes | None, str | None]]:
        """Yields each row as PNG, or the reason why there is none.

        If reading fails, all remaining rows get the reason.
        """
        done = 0
        try:
            for pixels in self._read_pixels(file, rows):
                if pixels is None:
                    yield None, f"{file.name} ends before row {rows[done]} does"
                else:
                    yield _encode_png(pixels), None
                done += 1
        except PIXEL_READ_ERRORS as error:
            yield from [(None, f"{file.name} cannot be read: {describe_os_error(error)}")] * (len(rows) - done)


@dataclass(frozen=True)
class RawPixelSource(PixelSource):
    """The images of binary files, plain or gzipped."""

    # Shape of the bytes of an image as they are stored
    shape: tuple[int, ...]
    # The axes of `shape` that are height, width and, if not grey, channels
    axes: tuple[int, ...]

    def _read_pixels(self, file: PixelFile, rows: list[int]) -> Iterator[np.ndarray | None]:
        size = int(np.prod(self.shape))
        with open_maybe_gzipped(self.root / file.name) as stream:
            for row in rows:
                stream.seek(file.start + row * (file.skip + size) + file.skip)
                data = stream.read(size)
                yield (
                    np.frombuffer(data, np.uint8).reshape(self.shape).transpose(self.axes)
                    if len(data) == size
                    else None
                )


def open_maybe_gzipped(file: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def count_rows(file: Path, row: int) -> int:
    """Returns the number of rows of `row` bytes in a file, the last of which may be cut.

    Raises:
        UserError: the file is empty.
    """
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file}: is empty (0 bytes); valid: rows of {row} bytes")
    return -(-size // row)


def _encode_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()

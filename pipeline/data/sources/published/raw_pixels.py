"""Images that a set publishes as raw pixels: rows of one length in binary files, handed on as PNG, which loses nothing."""

import gzip
import io
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from firstlight.pipeline.data.sources.source import Record, Source
from firstlight.pipeline.errors import UserError

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
)  # what a file raises that vanished, or whose compressed bytes are damaged
PNG_LEVEL = 3  # of zlib: a third of the time of the default 6 for 3 % more bytes


@dataclass(frozen=True)
class PixelFile:
    """`count` images in one file, whether it holds all of them or ends before. Binary files: `start` bytes, then rows of `skip` bytes and pixels."""

    name: str  # relative to the root
    count: int
    start: int = 0
    skip: int = 0


@dataclass(frozen=True)
class Pixels(Source):
    """The images of `files`, laid end to end."""

    root: Path
    files: tuple[PixelFile, ...]

    @abstractmethod
    def _pixels(self, file: PixelFile, rows: list[int]) -> Iterator[np.ndarray | None]:
        """(H, W, 3) or (H, W) uint8 of each of ascending rows; None where the file ends before the row does. May raise `UNREADABLE`."""

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        ends = np.cumsum([file.count for file in self.files])
        owners = np.searchsorted(ends, places, side="right")
        for k in np.unique(owners).tolist():
            file, mine = self.files[k], places[owners == k]
            rows = (mine - (ends[k] - file.count)).tolist()
            for row, label, (data, reason) in zip(
                rows, self.labels[mine].tolist(), self._encoded(file, rows), strict=True
            ):
                yield Record(f"{file.name}#{row}", data, label, reason)

    def _encoded(self, file: PixelFile, rows: list[int]) -> Iterator[tuple[bytes | None, str | None]]:
        """PNG, or a reason, of each row: where reading fails, the reason takes the place of the rest."""
        done = 0
        try:
            for pixels in self._pixels(file, rows):
                yield (
                    (_png(pixels), None)
                    if pixels is not None
                    else (None, f"{file.name} ends before row {rows[done]} does")
                )
                done += 1
        except UNREADABLE as error:
            told = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
            yield from [(None, f"{file.name} cannot be read: {told}")] * (len(rows) - done)


@dataclass(frozen=True)
class Raw(Pixels):
    """Of binary files, plain or gzipped."""

    shape: tuple[int, ...]  # of an image's bytes as stored
    axes: tuple[int, ...]  # which of them are height, width and, if not grey, channels

    def _pixels(self, file: PixelFile, rows: list[int]) -> Iterator[np.ndarray | None]:
        size = int(np.prod(self.shape))
        with opened(self.root / file.name) as stream:
            for row in rows:
                stream.seek(file.start + row * (file.skip + size) + file.skip)
                data = stream.read(size)
                yield (
                    np.frombuffer(data, np.uint8).reshape(self.shape).transpose(self.axes)
                    if len(data) == size
                    else None
                )


def opened(file: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def rows_in(file: Path, row: int) -> int:
    """Rows of `row` bytes, the last of which may be cut.

    Raises:
        UserError: there is none.
    """
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file}: is empty (0 bytes); valid: rows of {row} bytes")
    return -(-size // row)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()

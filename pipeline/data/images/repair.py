"""Files whose pixels are whole though Pillow refuses them: what is wrong is left out or added, or there is no repair.

PNG: texts and colour profiles that are too large or damaged are left out. JPEG: the end marker is added, if every pixel
is there without it.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from firstlight.pipeline.data.images.formats import JPEG_SIGNATURE, PNG_SIGNATURE

# Chunks of a PNG file that change no pixel. Keywords of texts that may hold the orientation.
PNG_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION_KEYWORDS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
# The largest text that is kept, inflated.
MAX_KEPT_TEXT = 1 << 20
JPEG_END = b"\xff\xd9"
# The bytes that are put after the last one of a JPEG file that breaks off, for a trial: zeros (which the decoder gives
# itself at the end marker), a mixture, and ones. Pixels that are there without them do not depend on them.
JPEG_FILLERS = (b"", b"\x55" * 64, b"\xfe\x7e" * 32)
# A marker within the data of a scan: not a stuffed zero, a restart marker or a fill byte.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
JPEG_PROGRESSIVE_FRAMES = {0xC2, 0xC6, 0xCA, 0xCE}
JPEG_COEFFICIENTS = 64


class RepairedFile(NamedTuple):
    """A file that Pillow reads, and the name of the repair in `readings`."""

    data: bytes
    reading: str


def repair_image(data: bytes, decode: Callable[[bytes], np.ndarray]) -> RepairedFile | None:
    """Returns a file with the same pixels that can be read, None if there is none. `decode` reads the pixels."""
    if data.startswith(PNG_SIGNATURE):
        without = _drop_png_texts(data)
        return None if without is None else RepairedFile(without, "png_text_dropped")
    if data.startswith(JPEG_SIGNATURE) and _has_all_pixels(data, decode):
        return RepairedFile(_complete_jpeg(data, b""), "jpeg_end_added")
    return None


def _drop_png_texts(data: bytes) -> bytes | None:
    """Returns a PNG file without texts and colour profiles, None if it has none.

    A small text that may hold the orientation stays, the first of its kind.
    """
    view, seen, dropped = memoryview(data), set[bytes](), False
    kept = [view[: len(PNG_SIGNATURE)]]
    for start, stop, name in _list_png_chunks(data):
        chunk = view[start:stop]
        keyword = _find_kept_keyword(name, chunk) if name in PNG_TEXT_CHUNKS else name
        if keyword is None or (name in PNG_TEXT_CHUNKS and keyword in seen):
            dropped = True
        else:
            seen.add(keyword)
            kept.append(chunk)
    return b"".join(kept) if dropped else None


def _list_png_chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yields start, end and name of each chunk; what cannot be one, to the end of the file, has no name."""
    place = len(PNG_SIGNATURE)
    while place < len(data):
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        stop = place + 12 + size
        if not name.isalpha() or stop > len(data):
            yield place, len(data), b""
            return
        yield place, stop, name
        place = stop


def _find_kept_keyword(name: bytes, chunk: memoryview) -> bytes | None:
    """Returns the keyword of a text that stays, None for others."""
    content = bytes(chunk[8 : 8 + MAX_KEPT_TEXT])
    keyword, _, rest = content.partition(b"\0")
    if keyword not in ORIENTATION_KEYWORDS or len(chunk) - 12 > MAX_KEPT_TEXT:
        return None
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return None
    # An international text says whether it is compressed; its language and its translated keyword come before it.
    if name == b"iTXt":
        is_small = rest[:1] == b"\0" or _is_small_inflated(rest[2:].split(b"\0", 2)[-1])
    else:
        is_small = name == b"tEXt" or _is_small_inflated(rest[1:])
    return keyword if is_small else None


def _is_small_inflated(data: bytes) -> bool:
    inflater = zlib.decompressobj()
    try:
        return len(inflater.decompress(data, MAX_KEPT_TEXT)) < MAX_KEPT_TEXT
    except zlib.error:
        return False


def _has_all_pixels(data: bytes, decode: Callable[[bytes], np.ndarray]) -> bool:
    """Returns True if a JPEG file that breaks off holds every pixel: whatever follows, they stay the same."""
    if not _has_all_scans(data):
        return False
    first, *others = (decode(_complete_jpeg(data, filler)) for filler in JPEG_FILLERS)
    return all(np.array_equal(first, other) for other in others)


def _complete_jpeg(data: bytes, filler: bytes) -> bytes:
    """Returns a JPEG file with its end marker, of which the first byte may be there."""
    return data.rstrip(b"\xff") + filler + JPEG_END


def _has_all_scans(data: bytes) -> bool:
    """Returns True if the scans of a JPEG file give every coefficient of every component to its last bit."""
    progressive, missing = False, dict[int, set[int]]()
    for marker, content in _list_jpeg_segments(data):
        if marker in JPEG_FRAMES and len(content) >= 6:
            progressive = marker in JPEG_PROGRESSIVE_FRAMES
            missing = {component: set(range(JPEG_COEFFICIENTS)) for component in content[6 : 6 + 3 * content[5] : 3]}
        elif marker == 0xDA and content:
            count = content[0]
            first, last, bits = content[1 + 2 * count : 4 + 2 * count] or (0, 0, 0)
            # The lower half of `bits` is the number of bits that later scans refine.
            given = set(range(first, last + 1)) if bits & 15 == 0 else set()
            for component in content[1 : 1 + 2 * count : 2]:
                missing[component] = missing.get(component, set()) - given if progressive else set()
    return bool(missing) and not any(missing.values())


def _list_jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the marker and the content of each segment with a length, as far as they are whole."""
    place = 2
    while found := JPEG_MARKER.search(data, place):
        marker, start = data[found.start() + 1], found.end()
        stop = start + int.from_bytes(data[start : start + 2], "big")
        if marker == JPEG_END[1] or stop > len(data) or stop < start + 2:
            return
        yield marker, data[start + 2 : stop]
        place = stop

"""Formats of image files, known by their first bytes: those that Pillow reads, and those that an extra reads."""

import importlib
from typing import NamedTuple

from PIL import Image

# Pillow's names of the formats that are read without an extra.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
JXL_CODESTREAM, JXL_CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
JPEG2000_CONTAINER = b"\0\0\0\x0cjP  \r\n\x87\n"
# Brands of ISO base media files.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
# The most brands of a file that are looked at.
MAX_BRANDS = 64


class FormatExtra(NamedTuple):
    """A format that a library besides Pillow reads, and the extra of this project that installs the library."""

    name: str
    extra: str
    module: str
    # Pillow's name of the format, once the module has registered it; "" if it is none of Pillow's.
    pillow_format: str


HEIC_EXTRA = FormatExtra("HEIC", "heic", "pillow_heif", "HEIF")
JXL_EXTRA = FormatExtra("JPEG XL", "jxl", "pillow_jxl", "JXL")
# It is read with `dataset.channels` alone: nobody knows which of its levels are black and white.
DICOM_EXTRA = FormatExtra("DICOM", "dicom", "pydicom", "")
DICOM_MARK, DICOM_MARK_PLACE = b"DICM", 128


def is_dicom(data: bytes) -> bool:
    """Returns True if a file begins as a DICOM file does: 128 bytes of anything, and a mark."""
    return data.startswith(DICOM_MARK, DICOM_MARK_PLACE)


def find_format_extra(data: bytes) -> FormatExtra | None:
    """Returns the library that a file needs besides Pillow, None if it needs none."""
    if data.startswith((JXL_CODESTREAM, JXL_CONTAINER)):
        return JXL_EXTRA
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), 16 + 4 * MAX_BRANDS)
    brands = {data[8:12], *(data[k : k + 4] for k in range(16, end, 4))}
    return HEIC_EXTRA if brands & HEIC_BRANDS and not brands & AVIF_BRANDS else None


def register_format(needed: FormatExtra) -> bool:
    """Makes Pillow read a format; returns False if the library of its extra is not installed."""
    if needed.pillow_format in Image.OPEN:
        return True
    try:
        plugin = importlib.import_module(needed.module)
    except ImportError:
        return False
    if needed is HEIC_EXTRA:
        plugin.register_heif_opener()
    return needed.pillow_format in Image.OPEN


def describe_missing_extra(needed: FormatExtra) -> str:
    return f"is {needed.name}, which needs an extra: pip install 'firstlight[{needed.extra}]'"


def find_declared_size(data: bytes) -> int:
    """Returns the number of bytes that a file declares to have, 0 if its format does not say.

    A file with fewer bytes was cut off.
    """
    if data[:4] == b"RIFF":
        return 8 + int.from_bytes(data[4:8], "little")
    if data[:2] == b"BM":
        return int.from_bytes(data[2:6], "little")
    if data[4:8] == b"ftyp" or data.startswith((JXL_CONTAINER, JPEG2000_CONTAINER)):
        return _add_boxes(data)
    if data.startswith(PNG_SIGNATURE):
        return _add_chunks(data)
    return 0


def _add_boxes(data: bytes) -> int:
    """Returns where the last box of an ISO base media file ends. A box of size 0 reaches to the end of the file."""
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:
            return max(place, len(data)) if size == 0 else 0
        place += size
    return place


def _add_chunks(data: bytes) -> int:
    """Returns where the chunk of a PNG file ends that is its last, or the one that the file breaks off in."""
    place = len(PNG_SIGNATURE)
    while place + 8 <= len(data):
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if not name.isalpha():
            return 0
        place += 12 + size
        if name == b"IEND":
            return place
    return max(place, len(data) + 1)

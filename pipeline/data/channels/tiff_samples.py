"""TIFF files of any number of channels, read by tifffile: channels side by side, in planes, or in pages."""

import io
import logging
import sys
import zlib
from contextlib import suppress
from typing import Any

import numpy as np

from firstlight.pipeline.data.channels.pixel_format import (
    FileFormat,
    PixelFormat,
    describe_pixel_format,
    limit_pixel_format,
)
from firstlight.pipeline.data.images.bad_image import BadImage, describe_pixel_limit
from firstlight.pipeline.data.images.headers import MIN_TILE_PIXELS, check_pixel_count
from firstlight.pipeline.data.images.orientation import turn_size

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# TIFF's numbers of compressions that are read, and those of them that need no extra. PHOTOMETRIC: min-is-white,
# min-is-black, RGB, separated inks.
READ_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "Zstandard"}
PLAIN_COMPRESSIONS, DEFLATE = (1, 8, 32946), (8, 32946)
READ_PHOTOMETRICS, MIN_IS_WHITE = (0, 1, 2, 5), 0
UNSIGNED_INTEGERS = 1
SAMPLE_FORMATS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
TIFF_ORIENTATION = 274
# The most bytes that deflate makes of one, and what a strip may become without being inflated for a trial first.
MAX_INFLATION, MAX_UNTRIED_BYTES = 1032, 1 << 28
# Bytes by which a strip that cannot be compressed may grow.
COMPRESSION_OVERHEAD = 4096

# tifffile logs what is odd about a file; a reason stands in the quarantine instead.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


def is_tiff(data: bytes) -> bool:
    """Returns True if a file begins as a TIFF file does."""
    return data.startswith(TIFF_SIGNATURES)


def read_tiff_format(data: bytes) -> FileFormat:
    """Returns the format of a TIFF file by its tags; call it within `raise_only_bad_image`.

    Raises:
        BadImage: `read_tiff_samples` reads it with no channels and bits, whatever they are.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = _list_pages(file)
        first = pages[0]
        pixels = limit_pixel_format(sum(page.samplesperpixel for page in pages), first.bitspersample)
        _check_channels(pages, pixels)
        check_pixel_count(first.imagewidth, first.imagelength, sys.maxsize)
        for page in pages:
            _check_compression(page, pixels)
        size = turn_size((first.imagewidth, first.imagelength), _find_orientation(first))
    return FileFormat(pixels, size, len(pages))


def read_tiff_samples(data: bytes, max_pixels: int, wanted: PixelFormat) -> tuple[np.ndarray, int]:
    """Returns the (H, W, C) samples of a TIFF file and its orientation; call it within `raise_only_bad_image`.

    The pages of a file are channels of one image, one page after the other, whatever number of them each has.

    Raises:
        BadImage: it has other channels than `wanted`, other bits, more than `max_pixels` pixels, pages of several
            sizes, a compression that is not read, or a palette.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = _list_pages(file)
        _check_channels(pages, wanted)
        parts = [_read_page(page, max_pixels, wanted) for page in pages]
        orientation = _find_orientation(pages[0])
    return (parts[0] if len(parts) == 1 else np.concatenate(parts, 2)), orientation


def _list_pages(file: Any) -> list[Any]:
    pages = [page.aspage() for page in file.pages]
    if not pages:
        raise BadImage("is TIFF without a page that can be read")
    return pages


def _find_orientation(page: Any) -> int:
    tag = page.tags.get(TIFF_ORIENTATION)
    return int(tag.value) if tag is not None else 1


def _check_channels(pages: list[Any], wanted: PixelFormat) -> None:
    for page in pages:
        _check_samples(page, wanted)
    found = sum(page.samplesperpixel for page in pages)
    if found != wanted.channels:
        of_pages = f" in {len(pages)} pages, whose channels count together" if len(pages) > 1 else ""
        raise BadImage(f"has {describe_pixel_format(found, wanted.bits)}{of_pages}; valid: {wanted}", "channels")
    if len({(page.imagewidth, page.imagelength) for page in pages}) > 1:
        raise BadImage("has pages of several sizes; valid: pages of one size, which are channels", "channels")


def _check_samples(page: Any, wanted: PixelFormat) -> None:
    kind = SAMPLE_FORMATS.get(int(page.sampleformat), "values of another kind")
    if int(page.sampleformat) != UNSIGNED_INTEGERS or page.bitspersample != wanted.bits:
        raise BadImage(
            f"has {page.bitspersample} bits a channel, {kind}; valid: {wanted}, unsigned integers", "channels"
        )
    if int(page.photometric) not in READ_PHOTOMETRICS:
        name = getattr(page.photometric, "name", page.photometric)
        raise BadImage(f"has colours of the kind {name}; valid: levels of each channel", "channels")


def _read_page(page: Any, max_pixels: int, wanted: PixelFormat) -> np.ndarray:
    """Returns the (H, W, C) samples of a page."""
    check_pixel_count(page.imagewidth, page.imagelength, max_pixels)
    limit = max(max_pixels, MIN_TILE_PIXELS)
    if page.is_tiled and page.tilewidth * page.tilelength > limit:
        raise BadImage(
            f"has tiles of {page.tilewidth} x {page.tilelength} pixels; valid: at most {describe_pixel_limit(limit)}",
            "too large",
        )
    _check_compression(page, wanted)
    values = np.asarray(page.asarray())
    # The dimension of the channels comes first if each has a plane of its own.
    values = (
        values.reshape(page.samplesperpixel, page.imagelength, page.imagewidth).transpose(1, 2, 0)
        if (int(page.planarconfig) == 2 and page.samplesperpixel > 1)
        else values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    )
    values = values.astype(wanted.dtype, copy=False)
    return wanted.white - values if int(page.photometric) == MIN_IS_WHITE else values


def _check_compression(page: Any, wanted: PixelFormat) -> None:
    """Checks that a page can be decompressed, to no more bytes than its pixels take."""
    number = int(page.compression)
    if number not in READ_COMPRESSIONS:
        valid = ", ".join(dict.fromkeys(READ_COMPRESSIONS.values()))
        raise BadImage(f"is compressed by {getattr(page.compression, 'name', number)}; valid: {valid}", "channels")
    if number not in PLAIN_COMPRESSIONS and not _has_codecs():
        name = READ_COMPRESSIONS[number]
        raise BadImage(
            f"is compressed by {name}, which needs an extra: pip install 'firstlight[tiff]'", "needs an extra"
        )
    shape = page.chunks
    raw = int(np.prod(shape)) * wanted.bits // 8
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if number != 1 and count > raw + COMPRESSION_OVERHEAD:
            raise BadImage("has a strip or tile with more bytes than its pixels", "unreadable")
        if number in DEFLATE and count * MAX_INFLATION > MAX_UNTRIED_BYTES:
            _try_inflating(page.parent.filehandle, offset, count, raw)


def _has_codecs() -> bool:
    with suppress(ImportError):
        import imagecodecs  # noqa: F401

        return True
    return False


def _try_inflating(handle: Any, offset: int, count: int, raw: int) -> None:
    handle.seek(offset)
    if len(zlib.decompressobj().decompress(handle.read(count), raw + 1)) > raw:
        raise BadImage("has a strip or tile that inflates to more bytes than its pixels", "unreadable")

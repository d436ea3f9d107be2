"""Encoded bytes -> RGB pixels, as a total function: any bytes give an image or a `BadImage`, nothing else.

Only Pillow decodes: torchvision's PNG decoder ends the whole process on a file with a bad checksum.
"""

import ctypes
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The EXIF tag of the orientation, and what makes each of its values upright.
EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags.
TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 322, 323
# The offset in a PNG file of the number of bits of a sample.
PNG_DEPTH_BYTE = 24
MAX_REASON_LENGTH = 200
# Pixels that are converted at a time.
BLOCK_PIXELS = 1_000_000
T = TypeVar("T")
# Pillow's limits and Python's warning filters are global to the process.
_pillow_lock = threading.RLock()


def _silence_pillow() -> None:
    """Silences Pillow and its libtiff about broken files: their messages name no file; `BadImage` has the reason."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    # On other systems than Linux, or if Pillow does not bring a libtiff, the messages remain.
    with suppress(OSError, AttributeError):
        mapped = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
        libtiff = next(iter({line[line.index("/") :] for line in mapped if "/libtiff" in line}), "")
        ctypes.CDLL(libtiff).TIFFSetErrorHandler(None)


_silence_pillow()


class BadImage(ValueError):
    """The bytes are not a usable image; the text is a short reason of one line."""


def open_rgb(data: bytes, max_pixels: int = 64_000_000) -> Image.Image:
    """Decodes to an image of mode "RGB", fully loaded and upright.

    `info` holds `mode` and `format` of the file and, if the image was not upright, its EXIF `orientation`. Of an
    animation the first frame is used. Transparent pixels are blended on white. More than 8 bits are scaled, not
    clipped: 16 bit grey by 1/257; 32 bit integers likewise if all of them fit 16 bits, floats by 255 if all are in
    0..1; otherwise both by the range of the image (lowest value black, highest white). EXIF data that cannot be read
    is ignored.

    Raises:
        BadImage: the bytes are not a whole image of one of `IMAGE_FORMATS`, or the header declares more than
            `max_pixels` pixels.
    """
    return _raise_only_bad_image(_open_rgb, data, max_pixels)


def _raise_only_bad_image(read: Callable[[bytes, int], T], data: bytes, max_pixels: int) -> T:
    """Returns `read(data, max_pixels)`; raises BadImage for whatever it raises."""
    try:
        with _pillow_limits(max_pixels):
            return read(data, max_pixels)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"larger than {max_pixels} pixels") from None
    except Exception as error:
        # Pillow's plugins raise any exception that their parsing of hostile bytes runs into.
        raise BadImage(_describe_error(error)) from None


def decode_rgb(data: bytes, max_pixels: int = 64_000_000) -> np.ndarray:
    """Decodes like `open_rgb`, to an array (H, W, 3) uint8.

    Raises:
        BadImage: see `open_rgb`.
    """
    return np.asarray(open_rgb(data, max_pixels))


def read_header_size(data: bytes) -> tuple[int, int]:
    """Returns width and height that an image's header declares. The pixels are not read.

    Raises:
        BadImage: the bytes are not an image of one of `IMAGE_FORMATS`.
    """
    return _raise_only_bad_image(lambda data, most: _open_header(data, most, IMAGE_FORMATS).size, data, sys.maxsize)


@contextmanager
def _pillow_limits(max_pixels: int) -> Iterator[None]:
    """Sets our pixel limit, silence, and no padding of truncated files in Pillow; restores its settings afterwards."""
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        # Pillow refuses images from twice its limit on, and some plugins allocate while opening: the limit must hold
        # there already.
        Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_class_map(data: bytes, max_pixels: int = 64_000_000) -> np.ndarray:
    """Decodes a PNG file with a palette, or with one channel of 8 bits, to its numbers (H, W) uint8.

    The numbers are the indices of the palette's entries, not their colours.

    Raises:
        BadImage: the bytes are not a whole file of this kind, or its header declares more than `max_pixels` pixels.
    """
    return _raise_only_bad_image(_open_class_map, data, max_pixels)


def _open_class_map(data: bytes, max_pixels: int) -> np.ndarray:
    image = _open_header(data, max_pixels, ("PNG",))
    # Pillow scales grey of fewer than 8 bits up to 255.
    if image.mode not in ("P", "L") or (image.mode == "L" and data[PNG_DEPTH_BYTE] != 8):
        raise BadImage(
            f"is not a map of classes but an image of mode {image.mode}, {data[PNG_DEPTH_BYTE]} bits; "
            "valid: a palette, or grey of 8 bits"
        )
    image.load()
    return np.asarray(image)


def _open_rgb(data: bytes, max_pixels: int) -> Image.Image:
    image = _open_header(data, max_pixels, IMAGE_FORMATS)
    facts: dict[str | tuple[int, int], Any] = {"mode": image.mode, "format": str(image.format)}
    image.load()
    orientation = _read_orientation(image)
    if orientation in EXIF_TRANSPOSES:
        facts["orientation"] = orientation
    rgb = _turn_upright(convert_to_rgb(image), orientation)
    rgb.info = facts
    return rgb


def _open_header(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    """Reads and checks the header; the pixels are not read yet."""
    if not data:
        raise BadImage("is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # Its text holds a memory address, which differs from run to run.
        raise BadImage(f"is not a readable image ({', '.join(formats)})") from None
    width, height = image.size
    if width < 1 or height < 1 or width * height > max_pixels:
        raise BadImage(f"has {width} x {height} pixels (at least 1 x 1, at most {max_pixels} in all)")
    _check_tile_size(image, max_pixels)
    return image


def _check_tile_size(image: Image.Image, max_pixels: int) -> None:
    """Limits the tiles of a TIFF image: a tile is decoded as a whole, even if the image is only a corner of it."""
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 1) for tag in (TIFF_TILE_WIDTH, TIFF_TILE_LENGTH)]
    # A small image may be the corner of a tile of ordinary size.
    limit = max(max_pixels, BLOCK_PIXELS)
    if tile[0] * tile[1] > limit:
        raise BadImage(f"has tiles of {tile[0]} x {tile[1]} pixels (at most {limit} in all)")


def _read_orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        # Broken EXIF data says nothing about the pixels.
        return 1


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(EXIF_TRANSPOSES[orientation]) if orientation in EXIF_TRANSPOSES else image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Converts a decoded image of any mode to "RGB", as `open_rgb` describes."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scale_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        return _blend_on_white(image.convert("RGBA"))
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _blend_on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _scale_to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scales (H, W) values of any type to (H, W) uint8, by the rule of `open_rgb`."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadImage("holds values that are not finite")
    full = 1.0 if mode == "F" else 65535.0
    if low >= 0.0 and high <= full:
        low, high = 0.0, full
    span, scaled = (high - low) or 1.0, np.empty(values.shape, np.uint8)
    step = max(1, BLOCK_PIXELS // values.shape[1])
    # In float64, eight times the memory of the image, therefore some rows at a time.
    for k in range(0, len(values), step):
        scaled[k : k + step] = np.rint((values[k : k + step].astype(np.float64) - low) * 255.0 / span)
    return scaled


def _describe_error(error: Exception) -> str:
    """Returns the text of an exception on one line, without memory addresses, or its type if it has no text."""
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the file", " ".join(str(error).split()))
    return (text or type(error).__name__)[:MAX_REASON_LENGTH]

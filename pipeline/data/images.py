"""Encoded bytes -> RGB pixels, as a total function: any bytes give an image or a `BadImage`, nothing else.

Pillow alone decodes: torchvision's PNG decoder ends the whole process on a file with a bad checksum.
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

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF tags
PNG_DEPTH = 24  # the byte of a PNG file that tells the bits of a sample
MAX_REASON = 200  # characters
BLOCK = 1_000_000  # pixels
T = TypeVar("T")
_settings = threading.RLock()  # Pillow's limits and Python's warning filters are global to the process


def _silence() -> None:
    """What Pillow and its libtiff say of a broken file is in the reason that we give; on stderr it names no file and nobody could use it."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(
        OSError, AttributeError
    ):  # not Linux, or a Pillow without a libtiff of its own: it talks, that is all
        mapped = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
        ctypes.CDLL(
            next(iter({line[line.index("/") :] for line in mapped if "/libtiff" in line}), "")
        ).TIFFSetErrorHandler(None)


_silence()


class BadImage(ValueError):
    """These bytes are no image that can be used; the text is a short reason of one line."""


def open_rgb(data: bytes, max_pixels: int = 64_000_000) -> Image.Image:
    """Decode to mode "RGB", fully loaded and upright; `info` holds the `mode` and `format` that the file had, and, where it was
    not upright, the EXIF orientation as `turned`.

    Of an animation, the first frame. Transparency is laid over white. More than 8 bits are scaled, not clipped: 16 bit grey by 1/257; 32
    bit integers likewise where all of them fit 16 bits, floats by 255 where all lie in 0..1, and otherwise either by the image's own range
    (lowest value black, highest white). EXIF orientation is applied; EXIF data that cannot be read is ignored.

    Raises:
        BadImage: the bytes are no whole image of one of `FORMATS`, or its header declares more than `max_pixels` pixels.
    """
    return _total(_decode, data, max_pixels)


def _total(read: Callable[[bytes, int], T], data: bytes, max_pixels: int) -> T:
    """`read` of any bytes: what it gives, or BadImage."""
    try:
        with _limits(max_pixels):
            return read(data, max_pixels)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"larger than {max_pixels} pixels") from None
    except Exception as error:  # Pillow's plugins raise whatever their parsing of hostile bytes runs into
        raise BadImage(_one_line(error)) from None


def decode(data: bytes, max_pixels: int = 64_000_000) -> np.ndarray:
    """As `open_rgb`, as an array (H, W, 3) uint8.

    Raises:
        BadImage: as `open_rgb`.
    """
    return np.asarray(open_rgb(data, max_pixels))


def size_in_header(data: bytes) -> tuple[int, int]:
    """Width and height that an image's header declares; its pixels are not read.

    Raises:
        BadImage: the bytes are no image of one of `FORMATS`.
    """
    return _total(lambda data, most: _opened(data, most, FORMATS).size, data, sys.maxsize)


@contextmanager
def _limits(max_pixels: int) -> Iterator[None]:
    """Our cap instead of the process's, silence, and no padding of truncated files; restored afterwards."""
    with _settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        # Pillow refuses from twice its limit on, and some plugins allocate while opening: so the cap has to hold there already
        Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_map(data: bytes, max_pixels: int = 64_000_000) -> np.ndarray:
    """A PNG file of one channel of 8 bits or a palette, as its numbers (H, W) uint8: those of the palette's entries, not their colours.

    Raises:
        BadImage: the bytes are no such file that is whole, or its header declares more than `max_pixels` pixels.
    """
    return _total(_map, data, max_pixels)


def _map(data: bytes, max_pixels: int) -> np.ndarray:
    image = _opened(data, max_pixels, ("PNG",))
    if image.mode not in ("P", "L") or (
        image.mode == "L" and data[PNG_DEPTH] != 8
    ):  # Pillow scales grey of fewer bits up to 255
        raise BadImage(
            f"is no map of classes but an image of mode {image.mode}, {data[PNG_DEPTH]} bits; valid: a palette, or grey of 8 bits"
        )
    image.load()
    return np.asarray(image)


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    image = _opened(data, max_pixels, FORMATS)
    seen: dict[str | tuple[int, int], Any] = {"mode": image.mode, "format": str(image.format)}
    image.load()
    turned = _orientation(image)
    if turned in TURNS:
        seen["turned"] = turned
    rgb = _upright(_to_rgb(image), turned)
    rgb.info = seen
    return rgb


def _opened(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    """The header is read and within the limits, the pixels are not read yet."""
    if not data:
        raise BadImage("is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:  # its text holds an address in memory, which differs from run to run
        raise BadImage(f"is not a readable image ({', '.join(formats)})") from None
    width, height = image.size
    if width < 1 or height < 1 or width * height > max_pixels:
        raise BadImage(f"has {width} x {height} pixels (at least 1 x 1, at most {max_pixels} in all)")
    _check_tiles(image, max_pixels)
    return image


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """A tile is allocated and decoded as a whole, also where the image is a corner of it."""
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 1) for tag in (TILE_WIDTH, TILE_LENGTH)]
    limit = max(max_pixels, BLOCK)  # a small image may be the corner of a usual tile
    if tile[0] * tile[1] > limit:
        raise BadImage(f"has tiles of {tile[0]} x {tile[1]} pixels (at most {limit} in all)")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """(H, W) of any type -> (H, W) uint8, by the rule of `open_rgb`."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadImage("holds values that are not finite")
    full = 1.0 if mode == "F" else 65535.0
    if low >= 0.0 and high <= full:
        low, high = 0.0, full
    span, scaled = (high - low) or 1.0, np.empty(values.shape, np.uint8)
    step = max(1, BLOCK // values.shape[1])
    for k in range(0, len(values), step):  # in float64, eight times what the image takes: not of all of it at once
        scaled[k : k + step] = np.rint((values[k : k + step].astype(np.float64) - low) * 255.0 / span)
    return scaled


def _one_line(error: Exception) -> str:
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the file", " ".join(str(error).split()))
    return (text or type(error).__name__)[:MAX_REASON]

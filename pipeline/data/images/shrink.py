"""Images made smaller once, when a store is written: decoding a photograph costs what its pixels and bytes cost.

An image is stored as its file, unless its shorter side has more pixels than the store's. Then it is stored upright, in
RGB or grey, resampled with an antialiased filter (Hamming's window, whose quality Pillow rates as that of bicubic for
smaller images, at half the cost): a file without loss as PNG, others as JPEG of STORED_JPEG_QUALITY with whole colour
(4:4:4). If that takes no fewer bytes, the file stays.
"""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from firstlight.pipeline.data.channels.channel_image import ChannelImage

STORED_JPEG_QUALITY, STORED_FILTER = 92, Image.Resampling.HAMMING
# Changes with the filter, the encoders or their options: stores of another version are other stores.
SHRINKING_RULES = 1
# Pillow's names of formats that lose nothing, or of which one cannot tell.
FORMATS_WITHOUT_LOSS = ("PNG", "BMP", "GIF", "TIFF", "PPM")
# A JPEG file is decoded with this many times the pixels of the stored side, at least, and then resampled.
DECODED_SIDE_RATIO = 2
# Pillow first averages whole blocks of pixels, down to this many times the size.
REDUCING_GAP = 3.0


class ShrunkImage(NamedTuple):
    """An image as it is stored: its file, and its pixels before they were encoded."""

    data: bytes
    pixels: Image.Image


def find_own_size(image: Image.Image | ChannelImage) -> tuple[int, int]:
    """Returns width and height of the upright image that `open_rgb` has opened, which may have decoded it smaller."""
    width, height = image.info.get("size", image.size)
    return width, height


def shrink_image(data: bytes, image: Image.Image, side: int) -> ShrunkImage | None:
    """Returns an image whose shorter side has `side` pixels, None if the file is stored as it is.

    `image`: the file `data` as `open_rgb` has opened it, with a `least_side` of DECODED_SIDE_RATIO times `side`. Images
    of more than 8 bits stay: their levels depend on the whole set.
    """
    width, height = find_own_size(image)
    if min(width, height) <= side or "levels" in image.info:
        return None
    scale = side / min(width, height)
    size = (side, max(side, round(height * scale))) if width <= height else (max(side, round(width * scale)), side)
    small = image.resize(size, STORED_FILTER, reducing_gap=REDUCING_GAP)
    is_lossless, is_grey = image.info["format"] in FORMATS_WITHOUT_LOSS, image.info["mode"] in ("1", "L")
    found = _encode_small_png(small, is_grey) if is_lossless else _encode_small_jpeg(small, is_grey)
    return ShrunkImage(found, small) if len(found) < len(data) else None


def _encode_small_png(image: Image.Image, is_grey: bool) -> bytes:
    file = io.BytesIO()
    (image.convert("L") if is_grey else image).save(file, "PNG")
    return file.getvalue()


def _encode_small_jpeg(image: Image.Image, is_grey: bool) -> bytes:
    if is_grey:
        grey = np.asarray(image.convert("L"))[:, :, None]
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(grey), STORED_JPEG_QUALITY, "GRAY", "Gray"))
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), STORED_JPEG_QUALITY, "RGB", "444"))

"""JPEG files decoded by libjpeg-turbo directly (simplejpeg): Pillow's pixels, bit for bit, in two thirds of its time.

Only files that are decoded without a warning are taken. For every other file Pillow decides, so that what is refused,
and for which reason, is the same.
"""

import simplejpeg
from PIL import Image

from firstlight.pipeline.data.images.formats import JPEG_SIGNATURE
from firstlight.pipeline.data.images.pixel_views import view_as_image

# Pillow's modes of the files that are taken.
PLAIN_JPEG_MODES = ("RGB", "L")
# Markers of segments: the start of a scan, frames, and others that say nothing about how pixels are to be seen.
SCAN_MARKER, FRAME_MARKERS, SIMPLE_MARKERS = 0xDA, (0xC0, 0xC1, 0xC2), (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)


def open_simple_jpeg(data: bytes, max_pixels: int, least_side: int | None = None) -> Image.Image | None:
    """Opens a JPEG file without orientation, profile or anything else of note, as the images of a bounded store are.

    Returns None if it is another file, or is not decoded without a warning: `open_rgb` then has Pillow look at it.
    `info` is that of `open_rgb`. Pillow's reading of the header would take a fifth of the time of a small image.
    """
    frame = _find_simple_frame(data)
    if frame is None or frame[0] * frame[1] > max_pixels:
        return None
    width, height, components = frame
    image = _decode_pixels(data, (width, height), least_side)
    if image is not None:
        image.info = {"mode": "L" if components == 1 else "RGB", "format": "JPEG"}
        image.info |= {"size": (width, height)} if image.size != (width, height) else {}
    return image


def _find_simple_frame(data: bytes) -> tuple[int, int, int] | None:
    """Returns width, height and number of components of a JPEG file; None if another segment than usual is there."""
    if not data.startswith(JPEG_SIGNATURE):
        return None
    place, frame = 2, None
    while len(data) > place + 9 and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == SCAN_MARKER:
            return frame
        if marker in FRAME_MARKERS and frame is None and data[place + 4] == 8 and data[place + 9] in (1, 3):
            height, width = (int.from_bytes(data[k : k + 2], "big") for k in (place + 5, place + 7))
            frame = (width, height, data[place + 9])
        elif marker not in SIMPLE_MARKERS or length < 2:
            return None
        place += 2 + length
    return None


def decode_plain_jpeg(data: bytes, header: Image.Image, least_side: int | None = None) -> Image.Image | None:
    """Returns the pixels of a JPEG file as an image of mode "RGB", not turned; None if Pillow must decode the file.

    `header`: the file as Pillow has opened it. `least_side`: the image may be decoded smaller, by eighths, as long as
    each of its sides has this many pixels (scaling in the domain of the cosine transform); None: at its own size.
    """
    if header.format != "JPEG" or header.mode not in PLAIN_JPEG_MODES or not data.startswith(JPEG_SIGNATURE):
        return None
    return _decode_pixels(data, header.size, least_side)


def _decode_pixels(data: bytes, size: tuple[int, int], least_side: int | None) -> Image.Image | None:
    least = least_side or 0
    try:
        # The slow but exact transforms, which Pillow uses.
        pixels = simplejpeg.decode_jpeg(data, "RGBX", False, False, least, least)
    except Exception:
        # Whatever it was, Pillow says what is wrong with the file, or reads it.
        return None
    if least_side is None and pixels.shape[1::-1] != size:
        return None
    return view_as_image(pixels)

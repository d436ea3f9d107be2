"""Colour images of 16 bits a sample. Pillow keeps the high byte of each sample; here both bytes are read.

Data of 12 bits in such a file lose all but their 4 highest bits with the low byte. The low bytes are read as Pillow
would read the high bytes of a file of the other byte order.
"""

import sys
from typing import Any

import numpy as np
from PIL import ImageFile

# The offset in a PNG file of the number of bits of a sample.
PNG_DEPTH_BYTE = 24
TIFF_BITS_PER_SAMPLE, TIFF_PLANAR_CONFIGURATION, TIFF_SEPARATE_PLANES = 258, 284, 2
# Layout of the samples in the file -> that of the other byte order. N is the byte order of this machine.
OTHER_BYTE_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
# Layouts whose samples are kept as they are, without their byte order.
PLAIN_LAYOUTS = ("RGB;16", "RGBA;16", "RGBX;16")
# A layout that Pillow has in one byte order only: the bytes of grey and alpha, as if they were four samples.
PNG_GREY_ALPHA, FOUR_BYTES = "LA;16B", "RGBA"


def is_deep_colour(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Returns True if the file has several samples of 16 bits a pixel. The pixels are not read."""
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA", "CMYK"):
        return False
    if image.format == "PNG":
        return data[PNG_DEPTH_BYTE] == 16
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE, (8,))
        return 16 in (bits if isinstance(bits, tuple) else (bits,))
    return image.format == "PPM" and _find_ppm_maximum(image) == 65535


def has_mixed_planes(image: ImageFile.ImageFile) -> bool:
    """Returns True for TIFF files with a plane for each colour, which Pillow misreads where they have 16 bits."""
    tags = getattr(image, "tag_v2", {})
    return bool(tags.get(TIFF_PLANAR_CONFIGURATION) == TIFF_SEPARATE_PLANES and image.tile[0][0] == "raw")


def read_deep_colour(data: bytes, image: ImageFile.ImageFile, again: ImageFile.ImageFile) -> np.ndarray | None:
    """Returns the (H, W, C) uint16 samples of an image of `is_deep_colour`, None if its low bytes cannot be read.

    C: grey, or red, green and blue; and alpha if the file has it. The samples of CMYK are not read.

    `image`: the image with its pixels loaded. `again`: the same file, opened once more and not loaded.
    """
    if image.format == "PPM":
        return _read_ppm_samples(data, again)
    if again.mode not in ("RGB", "RGBA", "RGBX") or not _swap_byte_order(again):
        return None
    layout = _find_layout(again)
    again.load()
    low = np.asarray(again)
    if layout == FOUR_BYTES:
        samples: np.ndarray = low[:, :, 0::2].astype(np.uint16) << 8 | low[:, :, 1::2]
        return samples
    both: np.ndarray = np.asarray(image).astype(np.uint16) << 8 | low
    # The fourth sample of RGBX says nothing.
    return both[:, :, :3] if again.mode == "RGBX" else both


def _find_layout(image: ImageFile.ImageFile) -> str:
    args: Any = image.tile[0][3]
    return str(args if isinstance(args, str) else args[0])


def _swap_byte_order(image: ImageFile.ImageFile) -> bool:
    """Makes Pillow read the other byte of each sample; returns False if it has no way to."""
    layout = _find_layout(image)
    if layout == PNG_GREY_ALPHA:
        swapped = FOUR_BYTES
    elif layout[:-1] in PLAIN_LAYOUTS:
        swapped = layout[:-1] + OTHER_BYTE_ORDER[layout[-1]]
    else:
        return False
    image.tile = [
        tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))  # type: ignore[index]
        for tile in image.tile
    ]
    return True


def _find_ppm_maximum(image: ImageFile.ImageFile) -> int:
    args: Any = image.tile[0][3]
    return int(args[1]) if isinstance(args, tuple) and len(args) == 2 and image.tile[0][0] == "ppm" else 0


def _read_ppm_samples(data: bytes, image: ImageFile.ImageFile) -> np.ndarray | None:
    width, height = image.size
    found = np.frombuffer(data, ">u2", offset=image.tile[0][2])[: width * height * 3]
    return found.reshape(height, width, 3).astype(np.uint16) if found.size == width * height * 3 else None

"""The EXIF orientation of an image: the pixels, boxes and maps of classes are turned upright alike.

The stored image is the one whose pixels the file holds; the upright image is the one that is seen.
"""

from typing import Any, Literal

import numpy as np
from PIL import Image

from firstlight.pipeline.data.images.formats import HEIC_EXTRA, JXL_EXTRA

# The EXIF tag of the orientation, and what makes each of its values upright.
EXIF_ORIENTATION = 0x0112
# The marks of which a PNG file with an orientation contains one.
PNG_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations in which width and height change places.
SWAPPED_ORIENTATIONS = (5, 6, 7, 8)
# The image that the positions of an annotation count in: as it is stored, or upright.
AnnotatedFrame = Literal["stored", "upright"]


def load_pixels(image: Image.Image) -> int:
    """Loads the pixels of an image, and returns the EXIF orientation that they have in the file."""
    # Pillow turns the pixels of TIFF files while it loads them, and forgets their orientation. A PNG file may have its
    # own after the pixels, and Pillow loads these to find it.
    orientation = read_orientation(image) if image.format == "TIFF" else None
    image.load()
    return read_orientation(image) if orientation is None else orientation


def read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image; 1 is upright. A PNG file has to be loaded before it has one."""
    # The decoders of these two turn the pixels themselves, by a number of the format's own. Only a JPEG file that is
    # kept whole in JPEG XL is not turned.
    if image.format in (HEIC_EXTRA.pillow_format, JXL_EXTRA.pillow_format) and not getattr(image, "jpeg", False):
        return 1
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        # Broken EXIF data says nothing about the pixels.
        return 1


def turn_image_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(EXIF_TRANSPOSES[orientation]) if orientation in EXIF_TRANSPOSES else image


def turn_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Returns width and height of the upright image for those of the stored one, and the other way round."""
    return (size[1], size[0]) if orientation in SWAPPED_ORIENTATIONS else size


def turn_boxes(boxes: np.ndarray, orientation: int, stored: tuple[int, int]) -> np.ndarray:
    """Turns boxes (k, 4): left, top, right, bottom, from the stored image, of (width, height), to the upright one."""
    if orientation not in EXIF_TRANSPOSES:
        return boxes
    left, top, right, bottom = boxes.T
    width, height = stored
    across, down = (left, right), (top, bottom)
    if orientation in (2, 3, 7, 8):
        across = (width - right, width - left)
    if orientation in (3, 4, 6, 7):
        down = (height - bottom, height - top)
    if orientation in SWAPPED_ORIENTATIONS:
        across, down = down, across
    return np.stack((across[0], down[0], across[1], down[1]), 1)


def turn_map(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns (H, W) numbers of the pixels of the stored image to those of the upright one."""
    if orientation not in EXIF_TRANSPOSES:
        return values
    return np.asarray(Image.fromarray(values).transpose(EXIF_TRANSPOSES[orientation]))


def find_annotated_frame(stated: Any, stored: tuple[int, int], upright: tuple[int, int]) -> AnnotatedFrame | None:
    """Returns the image that an annotation for an image of `stated` (width, height) counts in.

    None if it fits both, or neither.
    """
    fits = {"stored": stated == stored, "upright": stated == upright}
    if fits["stored"] == fits["upright"]:
        return None
    return "stored" if fits["stored"] else "upright"

"""Pillow's images as arrays and back, without a copy: a pixel has four bytes, the last of which says nothing."""

import numpy as np
import pyarrow as pa
from PIL import Image

# Red, green, blue, and a byte that makes it four.
PIXEL_BYTES = 4


def view_as_image(pixels: np.ndarray) -> Image.Image:
    """Returns (H, W, 4) uint8 as an image of mode "RGB" without the last channel, which is not copied."""
    height, width = pixels.shape[:2]
    levels = pa.Array.from_buffers(pa.uint8(), pixels.size, [None, pa.py_buffer(pixels)])
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(levels, PIXEL_BYTES), "RGB", (width, height))


def view_pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image of mode "RGB": (H, W, 4) uint8, which are its own and are not to be written.

    An image that Pillow has in several blocks, as it has those of many megabytes, is copied to (H, W, 3).
    """
    assert image.mode == "RGB", "views are made of images in colour"
    try:
        # Its type stubs do not know that Pillow exports its images.
        levels: pa.FixedSizeListArray = pa.array(image)
    except ValueError:
        return np.asarray(image)
    buffer = levels.values.buffers()[1]
    return np.frombuffer(buffer, np.uint8, PIXEL_BYTES * len(levels)).reshape(image.height, image.width, PIXEL_BYTES)

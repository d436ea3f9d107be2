"""Encoded bytes -> an image with its channels as they are, as a total function: any bytes give one or a `BadImage`.

Nothing is converted: an image with other channels or other bits than its data set states is refused. tifffile reads
TIFF, pydicom DICOM, Pillow PNG and formats that have 8 bits a channel.
"""

import numpy as np
from PIL import ImageFile

from firstlight.pipeline.data.channels.channel_image import UPRIGHT_MOVES, ChannelImage, turn_values_upright
from firstlight.pipeline.data.channels.dicom_samples import read_dicom_samples
from firstlight.pipeline.data.channels.pixel_format import PixelFormat, describe_pixel_format
from firstlight.pipeline.data.channels.tiff_samples import is_tiff, read_tiff_samples
from firstlight.pipeline.data.images.bad_image import BadImage, raise_only_bad_image
from firstlight.pipeline.data.images.deep_colour import PNG_DEPTH_BYTE, read_deep_colour
from firstlight.pipeline.data.images.formats import DICOM_EXTRA, is_dicom
from firstlight.pipeline.data.images.headers import open_file_header
from firstlight.pipeline.data.images.orientation import load_pixels

# Formats besides TIFF whose levels Pillow gives as they are in the file, and its modes whose bands are channels.
OTHER_FORMATS, BAND_MODES = ("PNG", "JPEG", "WEBP", "BMP"), ("L", "LA", "RGB", "RGBA")
# The channels of a PNG file by its type of colour, the byte after its depth; a palette, 3, has none.
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


def open_channels(data: bytes, wanted: PixelFormat, max_pixels: int = 64_000_000) -> ChannelImage:
    """Decodes to an upright image with the levels of the file.

    Raises:
        BadImage: the bytes are not a whole image of a format that is read so, it has another format of pixels than
            `wanted`, or its header declares more than `max_pixels` pixels.
    """
    # The bytes before the mark of DICOM may look like the begin of a TIFF file.
    read = _open_dicom if is_dicom(data) else _open_tiff if is_tiff(data) else _open_other
    return raise_only_bad_image(lambda: read(data, wanted, max_pixels), max_pixels)


def _open_tiff(data: bytes, wanted: PixelFormat, max_pixels: int) -> ChannelImage:
    values, orientation = read_tiff_samples(data, max_pixels, wanted)
    return _build_image(values, "TIFF", orientation)


def _open_dicom(data: bytes, wanted: PixelFormat, max_pixels: int) -> ChannelImage:
    return _build_image(read_dicom_samples(data, max_pixels, wanted), DICOM_EXTRA.name, 1)


def _open_other(data: bytes, wanted: PixelFormat, max_pixels: int) -> ChannelImage:
    image = open_file_header(data, max_pixels, OTHER_FORMATS)
    found = find_declared_pixels(image, data)
    if found is None:
        raise BadImage(f"has a palette, or pixels of another kind than {wanted}", "channels")
    if found != (wanted.channels, wanted.bits):
        raise BadImage(f"has {describe_pixel_format(*found)}; valid: {wanted}", "channels")
    kind, orientation = str(image.format), load_pixels(image)
    values: np.ndarray | None = np.asarray(image)
    if wanted.bits == 16 and not image.mode.startswith("I;16"):
        values = read_deep_colour(data, image, open_file_header(data, max_pixels, OTHER_FORMATS))
    if values is None:
        raise BadImage("has 16 bits a channel of which only the high ones can be read", "channels")
    return _build_image(np.atleast_3d(values).astype(wanted.dtype, copy=False), kind, orientation)


def find_declared_pixels(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int] | None:
    """Returns the channels and the bits that a header declares, None if its pixels are no levels of channels."""
    if image.format != "PNG":
        return (len(image.getbands()), 8) if image.mode in BAND_MODES else None
    channels = PNG_CHANNELS.get(data[PNG_DEPTH_BYTE + 1])
    return None if channels is None else (channels, data[PNG_DEPTH_BYTE])


def _build_image(values: np.ndarray, kind: str, orientation: int) -> ChannelImage:
    mode = describe_pixel_format(values.shape[2], 8 * values.dtype.itemsize)
    turned = {"orientation": orientation} if orientation in UPRIGHT_MOVES else {}
    upright = np.ascontiguousarray(turn_values_upright(values, orientation))
    return ChannelImage(upright, {"mode": mode, "format": kind, **turned})

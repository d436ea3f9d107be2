"""The format of the pixels that a file itself has, as a total function: any bytes give one or a `BadImage`."""

import sys

from firstlight.pipeline.data.channels.dicom_samples import read_dicom_format
from firstlight.pipeline.data.channels.pixel_format import FileFormat, describe_pixel_format, limit_pixel_format
from firstlight.pipeline.data.channels.read_channels import OTHER_FORMATS, find_declared_pixels
from firstlight.pipeline.data.channels.tiff_samples import is_tiff, read_tiff_format
from firstlight.pipeline.data.images import read_header_frame
from firstlight.pipeline.data.images.bad_image import BadImage, raise_only_bad_image
from firstlight.pipeline.data.images.formats import is_dicom
from firstlight.pipeline.data.images.headers import open_file_header


def read_file_format(data: bytes) -> FileFormat:
    """Returns the channels and bits by which `open_channels` reads a file, as far as its header tells.

    Raises:
        BadImage: it is no image, or one that no channels and bits fit.
    """
    read = read_dicom_format if is_dicom(data) else read_tiff_format if is_tiff(data) else _read_other_format
    return raise_only_bad_image(lambda: read(data), sys.maxsize)


def _read_other_format(data: bytes) -> FileFormat:
    image = open_file_header(data, sys.maxsize, OTHER_FORMATS)
    found = find_declared_pixels(image, data)
    if found is None:
        raise BadImage("has a palette, or pixels of another kind than levels of each channel", "channels")
    pixels = limit_pixel_format(*found)
    if found != (pixels.channels, pixels.bits):
        raise BadImage(f"has {describe_pixel_format(*found)}; valid: {pixels}", "channels")
    return FileFormat(pixels, read_header_frame(data).upright)

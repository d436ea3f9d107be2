"""DICOM files, read by pydicom, which the extra `dicom` installs: their stored values become levels of 8 or 16 bits.

The levels of computed tomography are Hounsfield units plus 32,768, whether a scanner stores them signed or unsigned and
with what intercept; other unsigned values are levels as they are.
"""

import io
import logging
import sys
from contextlib import suppress
from typing import Any

import numpy as np

from firstlight.pipeline.data.channels.pixel_format import (
    FileFormat,
    PixelFormat,
    describe_pixel_format,
    limit_pixel_format,
)
from firstlight.pipeline.data.images.bad_image import BadImage
from firstlight.pipeline.data.images.formats import DICOM_EXTRA, describe_missing_extra
from firstlight.pipeline.data.images.headers import check_pixel_count

# pydicom inflates such a file as a whole before anything of it can be checked.
DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"
# `PhotometricInterpretation`s whose samples are levels; those of YBR become red, green and blue.
MIN_IS_WHITE_LEVELS, GREY_LEVELS = "MONOCHROME1", ("MONOCHROME1", "MONOCHROME2")
COLOUR_LEVELS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
TOMOGRAPHY = "CT"
# The elements that a header with pixels must have.
NEEDED_ELEMENTS = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)


def read_dicom_format(data: bytes) -> FileFormat:
    """Returns the format of a DICOM file by its header; call it within `raise_only_bad_image`.

    Raises:
        BadImage: pydicom is missing, or `read_dicom_samples` reads the file with no channels and bits.
    """
    found = _read_elements(data, sys.maxsize)
    frames = _count_frames(found)
    pixels = limit_pixel_format(_count_channels(found), int(found.BitsAllocated))
    _check_format(found, pixels)
    _check_decoder(found)
    _read_intercept(found)
    return FileFormat(pixels, (int(found.Columns), int(found.Rows)), frames)


def read_dicom_samples(data: bytes, max_pixels: int, wanted: PixelFormat) -> np.ndarray:
    """Returns the (H, W, C) levels of a DICOM file; call it within `raise_only_bad_image`.

    The frames of a file are channels of one image, one after the other, as the pages of a TIFF file are.

    Raises:
        BadImage: pydicom is missing, or the file has other channels or bits than `wanted`, more than `max_pixels`
            pixels, a compression or colours that are not read, or levels that do not fit 16 bits.
    """
    found = _read_elements(data, max_pixels)
    _check_format(found, wanted)
    _check_decoder(found)
    samples = np.asarray(found.pixel_array)
    shape = (_count_frames(found), found.Rows, found.Columns, found.SamplesPerPixel)
    stacked = samples.reshape(shape).transpose(1, 2, 0, 3).reshape(found.Rows, found.Columns, -1)
    return _convert_to_levels(stacked, found, wanted)


def _read_elements(data: bytes, max_pixels: int) -> Any:
    """Returns the elements of a file, which say all that a reader must know before it decodes a pixel."""
    try:
        import pydicom
    except ImportError:
        raise BadImage(describe_missing_extra(DICOM_EXTRA), "needs an extra") from None
    # pydicom logs what is odd about a file; a reason stands in the quarantine instead.
    logging.getLogger("pydicom").propagate = False
    if DEFLATED_SYNTAX in data:
        raise BadImage("is DICOM that is deflated as a whole, which is not read", "channels")
    found = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in found:
        raise BadImage("is DICOM without pixels")
    if missing := [name for name in NEEDED_ELEMENTS if found.get(name) is None]:
        raise BadImage(f"is DICOM without {', '.join(missing)}")
    check_pixel_count(int(found.Columns), int(found.Rows), max_pixels)
    colours = str(found.PhotometricInterpretation)
    if colours not in (*GREY_LEVELS, *COLOUR_LEVELS):
        raise BadImage(f"has colours of the kind {colours}; valid: levels of each channel", "channels")
    return found


def _count_frames(found: Any) -> int:
    return int(found.get("NumberOfFrames") or 1)


def _count_channels(found: Any) -> int:
    return _count_frames(found) * int(found.SamplesPerPixel)


def _check_format(found: Any, wanted: PixelFormat) -> None:
    frames, channels, bits = _count_frames(found), _count_channels(found), int(found.BitsAllocated)
    if (channels, bits) != (wanted.channels, wanted.bits):
        of_frames = f" in {frames} frames, whose channels count together" if frames > 1 else ""
        raise BadImage(f"has {describe_pixel_format(channels, bits)}{of_frames}; valid: {wanted}", "channels")
    if int(found.HighBit) != int(found.BitsStored) - 1:
        raise BadImage(f"has samples whose highest bit is {found.HighBit} of {found.BitsStored}", "channels")


def _check_decoder(found: Any) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = found.file_meta.TransferSyntaxUID
    is_read = not syntax.is_encapsulated
    with suppress(NotImplementedError):
        is_read = is_read or get_decoder(syntax).is_available
    if not is_read:
        raise BadImage(f"is compressed by {syntax.name}, for which pydicom finds no decoder here", "channels")


def _convert_to_levels(stored: np.ndarray, found: Any, wanted: PixelFormat) -> np.ndarray:
    """Returns the levels of (H, W, C) stored values."""
    intercept = _read_intercept(found)
    is_signed, used = bool(found.PixelRepresentation), int(found.BitsStored)
    # Bits above those that are used may hold anything, as drawings did in old files.
    values = stored.astype(np.int64) & (2**used - 1)
    if is_signed:
        values = np.where(values >= 2 ** (used - 1), values - 2**used, values)
    highest = 2**used - 1
    if is_signed or intercept or found.get("Modality") == TOMOGRAPHY:
        values, highest = values + intercept + (wanted.white + 1) // 2, wanted.white
    if found.PhotometricInterpretation == MIN_IS_WHITE_LEVELS:
        values = highest - values
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > wanted.white:
        raise BadImage(f"has levels of {low:,} to {high:,}; valid: 0 to {wanted.white:,}", "channels")
    levels: np.ndarray = values.astype(wanted.dtype)
    return levels


def _read_intercept(found: Any) -> int:
    """Returns what is to be added to stored values, which are to be multiplied by nothing."""
    slope, intercept = float(found.get("RescaleSlope") or 1), float(found.get("RescaleIntercept") or 0)
    if slope != 1.0 or not intercept.is_integer():
        raise BadImage(
            f"has values that are to be multiplied by {slope:g}, plus {intercept:g}; valid: 1, plus a whole number",
            "channels",
        )
    return int(intercept)

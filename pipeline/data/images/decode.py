"""Encoded bytes -> RGB pixels, as a total function: any bytes give an image or a `BadImage`, nothing else.

Pillow decodes, but for whole JPEG files (`plain_jpeg`). torchvision's PNG decoder ends the whole process on a file with
a bad checksum.
"""

import sys
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from firstlight.pipeline.data.images.bad_image import BadImage, raise_only_bad_image
from firstlight.pipeline.data.images.deep_colour import has_mixed_planes, is_deep_colour, read_deep_colour
from firstlight.pipeline.data.images.formats import (
    IMAGE_FORMATS,
    JXL_EXTRA,
    describe_missing_extra,
    find_declared_size,
    find_format_extra,
    is_dicom,
    register_format,
)
from firstlight.pipeline.data.images.headers import check_pixel_count, open_file_header
from firstlight.pipeline.data.images.jpeg_xl import read_jxl_size
from firstlight.pipeline.data.images.levels import (
    LevelRanges,
    find_level_kind,
    find_value_range,
    guess_level_range,
    scale_to_8_bits,
)
from firstlight.pipeline.data.images.orientation import (
    EXIF_TRANSPOSES,
    PNG_ORIENTATION_MARKS,
    load_pixels,
    read_orientation,
    turn_image_upright,
    turn_size,
)
from firstlight.pipeline.data.images.plain_jpeg import decode_plain_jpeg, open_simple_jpeg
from firstlight.pipeline.data.images.repair import repair_image


class ImageFrame(NamedTuple):
    """Sizes (width, height) of an image as it is stored and as it is seen, and the EXIF orientation between them."""

    stored: tuple[int, int]
    upright: tuple[int, int]
    orientation: int


def open_rgb(
    data: bytes, max_pixels: int = 64_000_000, levels: LevelRanges | None = None, least_side: int | None = None
) -> Image.Image:
    """Decodes to an image of mode "RGB", fully loaded and upright.

    `info` holds `mode` and `format` of the file; if the image was not upright, its EXIF `orientation`; if it has more
    than 8 bits a sample, its `levels`: kind, lowest and highest; and if something was decided in reading it, the
    `readings`: names in `readings.READING_SENTENCES`. The first frame of an animation is used. Transparent pixels are
    blended on white. More than 8 bits are scaled to the range of their kind in `levels`, the ranges of the data set;
    without one, as `guess_level_range` describes. EXIF data that cannot be read is ignored.

    `least_side`: a JPEG file may be decoded smaller, see `decode_plain_jpeg`; `info` then holds its own `size`.

    Raises:
        BadImage: the bytes are not a whole image of one of `IMAGE_FORMATS` or of an extra that is installed, or the
            header declares more than `max_pixels` pixels.
    """
    if (simple := open_simple_jpeg(data, max_pixels, least_side)) is not None:
        return simple
    return raise_only_bad_image(lambda: _open_repaired(data, max_pixels, levels or {}, least_side), max_pixels)


def decode_rgb(data: bytes, max_pixels: int = 64_000_000, levels: LevelRanges | None = None) -> np.ndarray:
    """Decodes like `open_rgb`, to an array (H, W, 3) uint8.

    Raises:
        BadImage: see `open_rgb`.
    """
    return np.asarray(open_rgb(data, max_pixels, levels))


class ImageHeader(NamedTuple):
    """The frame that an image's header declares, and Pillow's mode of its pixels."""

    frame: ImageFrame
    mode: str


def read_header_frame(data: bytes) -> ImageFrame:
    """Returns the sizes that an image's header declares, and its orientation.

    Raises:
        BadImage: as `read_header`.
    """
    return read_header(data).frame


def read_header(data: bytes) -> ImageHeader:
    """Returns the frame and the mode that an image's header declares.

    The pixels are only read of PNG files that may have an orientation, since it may stand after them.

    Raises:
        BadImage: the bytes are not an image of one of `IMAGE_FORMATS`.
    """

    def read() -> ImageHeader:
        header = _open_any_header(data)
        mode = header.mode
        return ImageHeader(_find_frame(header, data), mode)

    return raise_only_bad_image(read, sys.maxsize)


def _open_any_header(data: bytes) -> ImageFile.ImageFile:
    """Opens the header of an image of any size, of a file that must be repaired too."""
    try:
        return _open_header(data, sys.maxsize)
    except Exception:
        repaired = repair_image(data, lambda complete: np.empty(0))
        if repaired is None:
            raise
    return _open_header(repaired.data, sys.maxsize)


def _find_frame(image: Image.Image, data: bytes) -> ImageFrame:
    size, orientation = image.size, 1
    if image.format != "PNG":
        orientation = read_orientation(image)
    elif any(mark in data for mark in PNG_ORIENTATION_MARKS):
        orientation = load_pixels(image)
    # Pillow gives the size of the upright image for TIFF.
    upright = size if image.format == "TIFF" else turn_size(size, orientation)
    return ImageFrame(turn_size(upright, orientation), upright, orientation)


def _open_repaired(data: bytes, max_pixels: int, levels: LevelRanges, least_side: int | None) -> Image.Image:
    """Opens an image; if it cannot be read, as a file with the same pixels that can."""
    try:
        return _open_rgb(data, max_pixels, levels, least_side)
    except Exception as error:
        if isinstance(error, Image.DecompressionBombError):
            raise
        if isinstance(error, BadImage) and error.kind not in ("unreadable", "truncated"):
            raise
        repaired = repair_image(data, lambda complete: np.asarray(_open_rgb(complete, max_pixels, levels)))
        if repaired is None:
            raise _explain_cut_off(data, error) from None
    rgb = _open_rgb(repaired.data, max_pixels, levels)
    rgb.info["readings"] = (*rgb.info.get("readings", ()), repaired.reading)
    return rgb


def _explain_cut_off(data: bytes, error: Exception) -> Exception:
    """Returns an error that says so if a file has fewer bytes than it declares, else `error`."""
    declared = find_declared_size(data)
    if declared <= len(data):
        return error
    return BadImage(f"is truncated: {len(data)} of at least {declared} bytes are there", "truncated")


def _open_rgb(data: bytes, max_pixels: int, levels: LevelRanges, least_side: int | None = None) -> Image.Image:
    image = _open_header(data, max_pixels)
    facts: dict[str | tuple[int, int], Any] = {"mode": image.mode, "format": str(image.format)}
    if (plain := decode_plain_jpeg(data, image, least_side)) is not None:
        orientation = read_orientation(image)
        facts |= {"orientation": orientation} if orientation in EXIF_TRANSPOSES else {}
        facts |= {"size": turn_size(image.size, orientation)} if plain.size != image.size else {}
        rgb = turn_image_upright(plain, orientation)
        rgb.info = facts
        return rgb
    is_deep = is_deep_colour(image, data)
    if is_deep and has_mixed_planes(image):
        raise BadImage("has 16 bits a sample in separate planes, which is not read; valid: interleaved samples")
    orientation = load_pixels(image)
    if orientation in EXIF_TRANSPOSES:
        facts["orientation"] = orientation
    samples = read_deep_colour(data, image, _open_header(data, max_pixels)) if is_deep else None
    rgb, found = _convert_samples(image, samples, levels)
    # Pillow has turned the pixels of TIFF files while it loaded them.
    rgb = rgb if image.format == "TIFF" else turn_image_upright(rgb, orientation)
    facts |= {"levels": found} if found else {}
    decided = {"high_bytes_only": is_deep and samples is None, "first_frame": _has_more_frames(image)}
    if any(decided.values()):
        facts["readings"] = tuple(name for name, is_so in decided.items() if is_so)
    rgb.info = facts
    return rgb


def _has_more_frames(image: Image.Image) -> bool:
    try:
        # A phone's JPEG with a preview or a second view inside is one photograph.
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:
        # The data after the first frame are damaged; they are not read.
        return False


def _open_header(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Reads and checks the header of an image; the pixels are not read yet."""
    formats: tuple[str, ...] = IMAGE_FORMATS
    if is_dicom(data):
        raise BadImage("is DICOM; valid: dataset.channels=1 dataset.bits=16, which keep its levels", "channels")
    if (needed := find_format_extra(data)) is not None:
        if not register_format(needed):
            raise BadImage(describe_missing_extra(needed), "needs an extra")
        formats = (needed.pillow_format,)
        if needed is JXL_EXTRA and (size := read_jxl_size(data)) is not None:
            check_pixel_count(*size, max_pixels)
    return open_file_header(data, max_pixels, formats)


def convert_to_rgb(image: Image.Image, levels: LevelRanges | None = None) -> Image.Image:
    """Converts a loaded image of any mode to "RGB", as `open_rgb` describes; `info` holds its `levels`, if any."""
    rgb, found = _convert_samples(image, None, levels or {})
    rgb.info = {"levels": found} if found else {}
    return rgb


def _convert_samples(
    image: Image.Image, samples: np.ndarray | None, levels: LevelRanges
) -> tuple[Image.Image, tuple[str, float, float] | None]:
    """Returns an image as RGB, and the kind, lowest and highest of its levels if it has more than 8 bits.

    `samples`: (H, W, C) uint16 if they are colours of 16 bits.
    """
    kind = "16-bit colour" if samples is not None else find_level_kind(image.mode)
    if kind is None:
        return _convert_8_bits(image), None
    values = np.asarray(image) if samples is None else _drop_alpha(samples)
    low, high = find_value_range(values)
    black, white = levels.get(kind) or guess_level_range(kind, low, high)
    if samples is None:
        scaled = Image.fromarray(scale_to_8_bits(values, black, white))
    elif (black, white) == (0.0, 65535.0):
        # The high bytes, as Pillow reads them.
        scaled = image
    else:
        scaled = _scale_samples(samples, black, white)
    return _convert_8_bits(scaled), (kind, low, high)


def _drop_alpha(samples: np.ndarray) -> np.ndarray:
    """Returns the grey or the colours of (H, W, C) samples, whose last channel is alpha if C is 2 or 4."""
    return samples if samples.shape[2] == 3 else samples[:, :, :-1]


def _scale_samples(samples: np.ndarray, black: float, white: float) -> Image.Image:
    """Scales (H, W, C) uint16: grey or colours, and alpha, to an image of 8 bits.

    Alpha of 16 bits may come with colours of fewer.
    """
    scaled = scale_to_8_bits(_drop_alpha(samples), black, white)
    if samples.shape[2] != 3:
        alpha = samples[:, :, -1:]
        full = white if alpha.max() <= white else 65535.0
        scaled = np.concatenate([scaled, scale_to_8_bits(alpha, 0.0, full)], 2)
    mode = {2: "LA", 3: "RGB", 4: "RGBA"}[samples.shape[2]]
    return Image.frombytes(mode, scaled.shape[1::-1], np.ascontiguousarray(scaled).tobytes())


def _convert_8_bits(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        return _blend_on_white(image.convert("RGBA"))
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _blend_on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")

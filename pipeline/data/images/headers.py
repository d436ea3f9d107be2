"""Headers of image files: opened by Pillow and checked against the limit of pixels, before any pixel is read."""

import io

from PIL import Image, ImageFile, UnidentifiedImageError

from firstlight.pipeline.data.images.bad_image import BadImage, describe_pixel_limit

# TIFF tags.
TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 322, 323
# The smallest limit of the pixels of a tile.
MIN_TILE_PIXELS = 1_000_000


def open_file_header(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Reads and checks the header of a file of one of Pillow's `formats`; call it within `raise_only_bad_image`.

    Raises:
        BadImage: it is none, or declares more than `max_pixels` pixels.
    """
    if not data:
        raise BadImage("is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # Its text holds a memory address, which differs from run to run.
        raise BadImage(f"is not a readable image ({', '.join(formats)})") from None
    check_pixel_count(*image.size, max_pixels)
    _check_tile_size(image, max_pixels)
    return image


def check_pixel_count(width: int, height: int, max_pixels: int) -> None:
    """Checks the size that a header declares.

    Raises:
        BadImage: it has no pixel, or more than `max_pixels`.
    """
    if width < 1 or height < 1:
        raise BadImage(f"has {width} x {height} pixels; valid: at least 1 x 1")
    if width * height > max_pixels:
        limit = describe_pixel_limit(max_pixels)
        raise BadImage(f"has {width} x {height} pixels; valid: at most {limit}", "too large")


def _check_tile_size(image: Image.Image, max_pixels: int) -> None:
    """Limits the tiles of a TIFF image: a tile is decoded as a whole, even if the image is only a corner of it."""
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 1) for tag in (TIFF_TILE_WIDTH, TIFF_TILE_LENGTH)]
    # A small image may be the corner of a tile of ordinary size.
    limit = max(max_pixels, MIN_TILE_PIXELS)
    if tile[0] * tile[1] > limit:
        raise BadImage(
            f"has tiles of {tile[0]} x {tile[1]} pixels; valid: at most {describe_pixel_limit(limit)}", "too large"
        )

"""The EXIF orientation turns pixels, boxes and maps alike, in every format."""

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import open_rgb, read_header_frame
from firstlight.pipeline.data.images.orientation import (
    find_annotated_frame,
    load_pixels,
    turn_boxes,
    turn_image_upright,
    turn_map,
    turn_size,
)
from tests.support.odd_images import encode_image, make_exif

ORIENTATIONS = range(1, 9)
# The meaning of each orientation in EXIF: the sides on which the first row and the first column of the file are seen.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
FORMATS = {
    "PNG": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF deflate": {"compression": "tiff_adobe_deflate"},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_format_is_turned_once(name: str, orientation: int) -> None:
    smooth = np.asarray(Image.fromarray(PIXELS).resize((5, 3)).resize((40, 24), Image.Resampling.BICUBIC))
    data = encode_image(smooth, name.split()[0], exif=make_exif(orientation), **FORMATS[name])
    image = open_rgb(data)
    expected = TURNED[orientation](smooth)
    assert image.size == expected.shape[1::-1]
    tolerance = 14 if name in ("JPEG", "AVIF") else 0
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance
    assert image.info.get("orientation", 1) == orientation
    frame = read_header_frame(data)
    assert frame == ((40, 24), image.size, orientation)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_boxes_and_maps_lie_where_their_pixels_are(orientation: int) -> None:
    marked = np.zeros((20, 30), np.uint8)
    marked[3:8, 11:25] = 1
    turned = turn_map(marked, orientation)
    np.testing.assert_array_equal(turned, TURNED[orientation](marked))
    rows, columns = np.nonzero(turned)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert turn_boxes(np.array([[11, 3, 25, 8.0]]), orientation, (30, 20)).tolist() == [expected]
    assert turn_size((30, 20), orientation) == turned.shape[::-1]
    np.testing.assert_array_equal(turn_image_upright(Image.fromarray(marked), orientation), turned)


@pytest.mark.parametrize(
    ("stated", "frame"),
    [((30, 20), "stored"), ((20, 30), "upright"), ((30, 30), None), (None, None), ((3, 2), None)],
)
def test_stated_size_decides_the_frame(stated: tuple[int, int] | None, frame: str | None) -> None:
    assert find_annotated_frame(stated, (30, 20), (20, 30)) == frame
    assert find_annotated_frame(stated, (30, 30), (30, 30)) is None


def test_broken_png_is_not_loaded_twice() -> None:
    """Pillow loads a PNG file to look for its EXIF data; a second attempt to load it would give zeros."""
    data = bytearray(encode_image(PIXELS))
    data[41] ^= 1
    image = Image.open(__import__("io").BytesIO(bytes(data)))
    with pytest.raises(OSError, match="broken data stream"):
        load_pixels(image)

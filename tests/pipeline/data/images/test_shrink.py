"""An image is made smaller with little loss, in the kind of its file, or left alone."""

import io

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import decode_rgb, open_rgb
from firstlight.pipeline.data.images.shrink import (
    DECODED_SIDE_RATIO,
    STORED_JPEG_QUALITY,
    ShrunkImage,
    find_own_size,
    shrink_image,
)
from tests.support.photograph_folders import encode_photograph, make_photograph


def shrink(data: bytes, side: int) -> ShrunkImage | None:
    return shrink_image(data, open_rgb(data, least_side=DECODED_SIDE_RATIO * side), side)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 200), (75, 50)), ((200, 301), (50, 75)), ((70, 3000), (50, 2143)), ((80, 80), (50, 50))],
)
def test_the_shorter_side_is_that_of_the_store(size: tuple[int, int], expected: tuple[int, int]) -> None:
    found = shrink(encode_photograph(make_photograph(*size)), 50)
    assert found is not None
    stored = Image.open(io.BytesIO(found.data))
    assert (stored.format, stored.mode, stored.size, found.pixels.size) == ("JPEG", "RGB", expected, expected)


def test_jpeg_is_stored_with_whole_colour_and_little_loss() -> None:
    picture = make_photograph(640, 480)
    found = shrink(encode_photograph(picture), 60)
    assert found is not None
    exact = np.asarray(picture.resize((80, 60), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(found.pixels) - exact).mean() < 0.7
    assert np.abs(decode_rgb(found.data) - exact).mean() < 1.5
    stored = Image.open(io.BytesIO(found.data))
    assert [layer[1:3] for layer in stored.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
    again = Image.open(io.BytesIO(encode_photograph(found.pixels)))
    by_pillow = io.BytesIO()
    found.pixels.save(by_pillow, "JPEG", quality=STORED_JPEG_QUALITY, subsampling=0)
    assert again.size == stored.size
    assert stored.quantization == Image.open(by_pillow).quantization  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM"])
def test_files_without_loss_stay_without_loss(kind: str) -> None:
    picture = make_photograph(300, 200)
    found = shrink(encode_photograph(picture, kind), 50)
    assert found is not None
    assert Image.open(io.BytesIO(found.data)).format == "PNG"
    expected = picture.resize((75, 50), Image.Resampling.HAMMING, reducing_gap=3.0)
    np.testing.assert_array_equal(decode_rgb(found.data), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_images_stay_grey(kind: str) -> None:
    found = shrink(encode_photograph(make_photograph(300, 200).convert("L"), kind), 50)
    assert found is not None
    assert Image.open(io.BytesIO(found.data)).mode == "L"


def test_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode_photograph(make_photograph(300, 200), exif=exif)
    assert find_own_size(open_rgb(data, least_side=100)) == (200, 300)
    found = shrink(data, 50)
    assert found is not None
    upright = open_rgb(data).resize((50, 75), Image.Resampling.HAMMING)
    stored = open_rgb(found.data)
    assert "orientation" not in stored.info
    assert np.abs(np.asarray(stored).astype(int) - np.asarray(upright)).mean() < 1.5


def test_images_are_left_alone_that_are_small_or_deep_or_would_grow() -> None:
    assert shrink(encode_photograph(make_photograph(300, 50), "BMP"), 50) is None
    deep = Image.fromarray(np.arange(200 * 200, dtype=np.uint16).reshape(200, 200))
    assert shrink(encode_photograph(deep, "PNG"), 50) is None
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    assert shrink(encode_photograph(rough.quantize(4), "PNG"), 59) is None

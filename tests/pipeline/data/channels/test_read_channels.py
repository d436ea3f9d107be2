"""Files with their channels as they are: their levels come out unchanged, or they are refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.images.bad_image import BadImage
from tests.support.channel_images import draw_bands, encode_bands, encode_pages
from tests.support.odd_images import encode_image, encode_png_16


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_both_bytes_of_every_channel(channels: int) -> None:
    values = draw_bands(0, channels)
    found = open_channels(encode_png_16(values), PixelFormat(channels, 16))
    assert np.array_equal(found.values, values)
    assert found.values.dtype == np.uint16
    assert len(np.unique(found.values & 255)) > 100
    assert found.info["format"] == "PNG"


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_images_of_8_bits_keep_their_channels(channels: int, mode: str) -> None:
    values = draw_bands(0, channels, bits=8)
    data = encode_image(Image.frombytes(mode, (32, 32), values.tobytes()))
    found = open_channels(data, PixelFormat(channels, 8))
    assert np.array_equal(found.values, values)
    assert found.info["mode"] == str(PixelFormat(channels, 8))


def test_grey_jpeg_stays_grey() -> None:
    data = encode_image(Image.fromarray(draw_bands(0, 1, bits=8)[:, :, 0]), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(open_channels(data, PixelFormat(1, 8)).values[:, :, 0], expected)


@pytest.mark.parametrize("encode", [encode_bands, encode_pages])
def test_tiff_of_16_bits_keeps_every_value(encode: object) -> None:
    values = draw_bands(0)
    found = open_channels(encode(values), PixelFormat(13, 16))  # type: ignore[operator]
    assert np.array_equal(found.values, values)
    assert found.info == {"mode": "13 channels of 16 bits", "format": "TIFF"}


def test_an_orientation_is_turned_upright() -> None:
    values = draw_bands(0)[:20]
    found = open_channels(encode_bands(values, extratags=[(274, 3, 1, 6, True)]), PixelFormat(13, 16))
    assert found.size == (20, 32)
    assert np.array_equal(found.values, np.rot90(values, -1))
    assert found.info["orientation"] == 6


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode_image(Image.new("RGB", (8, 8))), "has 3 channels of 8 bits; valid: 1 channel of 16 bits"),
        (encode_image(Image.new("L", (8, 8))), "has 1 channel of 8 bits; valid: 1 channel of 16 bits"),
        (encode_image(Image.new("P", (8, 8))), "has a palette, or pixels of another kind than 1 channel of 16 bits"),
        (encode_image(Image.new("1", (8, 8))), "has 1 channel of 1 bits; valid: 1 channel of 16 bits"),
        (encode_png_16(draw_bands(0, 2)), "has 2 channels of 16 bits; valid: 1 channel of 16 bits"),
        (b"\0" * 128 + b"DICM" + b"\0" * 100, "is DICOM without pixels"),
        (encode_image(Image.new("L", (8, 8)), "GIF"), r"is not a readable image \(PNG, JPEG, WEBP, BMP\)"),
        (b"", r"is empty \(0 bytes\)"),
        (encode_png_16(draw_bands(0, 1))[:-300], ".+"),
    ],
)
def test_other_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^{reason}"):
        open_channels(data, PixelFormat(1, 16))

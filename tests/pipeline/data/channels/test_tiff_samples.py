"""TIFF files of many channels: every layout gives the same samples, and others are refused by name."""

import numpy as np
import pytest

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.channels.tiff_samples import is_tiff, read_tiff_samples
from firstlight.pipeline.data.images.bad_image import BadImage, raise_only_bad_image
from tests.support.channel_images import draw_bands, encode_bands, encode_pages

VALUES, BANDS = draw_bands(0), PixelFormat(13, 16)


def read(data: bytes, wanted: PixelFormat = BANDS, limit: int = 10_000) -> np.ndarray:
    return raise_only_bad_image(lambda: read_tiff_samples(data, limit, wanted)[0], limit)


LAYOUTS = {
    "side by side": encode_bands(VALUES),
    "planes": encode_bands(VALUES.transpose(2, 0, 1), planarconfig="separate"),
    "pages": encode_pages(VALUES),
    "tiles": encode_bands(VALUES, tile=(16, 16)),
    "big endian": encode_bands(VALUES, byteorder=">"),
    "BigTIFF": encode_bands(VALUES, bigtiff=True),
    "deflate with differences": encode_bands(VALUES, compression="deflate", predictor=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_values_of_the_file(layout: str) -> None:
    assert is_tiff(LAYOUTS[layout])
    assert np.array_equal(read(LAYOUTS[layout]), VALUES)


def test_min_is_white_is_inverted_and_grey_has_one_channel() -> None:
    grey = draw_bands(1, channels=1, bits=8)
    assert np.array_equal(read(encode_bands(grey, photometric="miniswhite"), PixelFormat(1, 8)), 255 - grey)
    assert np.array_equal(read(encode_bands(grey), PixelFormat(1, 8)), grey)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode_bands(VALUES[:, :, :12]), r"has 12 channels of 16 bits; valid: 13 channels of 16 bits"),
        (encode_pages(VALUES[:, :, :4]), r"has 4 channels of 16 bits in 4 pages, whose channels count together"),
        (encode_bands((VALUES >> 8).astype(np.uint8)), r"has 8 bits a channel, unsigned integers; valid: 13"),
        (encode_bands(VALUES.astype(np.int16)), r"has 16 bits a channel, signed integers; valid: 13"),
        (encode_bands(VALUES.astype(np.float32)), r"has 32 bits a channel, floats; valid: 13"),
        (encode_bands(np.zeros((200, 200, 13), np.uint16)), r"has 200 x 200 pixels; valid: at most 10000 pixels"),
        (encode_bands(VALUES, compression="lzma"), r"is compressed by LZMA; valid: none, LZW, deflate, .*"),
        (encode_bands(VALUES)[:-50], r".+"),
        (encode_pages(VALUES)[:-50], r".+"),
        (b"II*\0" + b"\xff" * 60, r".+"),
        (b"II*\0junk", r"is TIFF without a page that can be read"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^{reason}"):
        read(data)


def test_a_palette_is_no_channel() -> None:
    colours = np.zeros((3, 256), np.uint16)
    data = encode_bands(np.zeros((8, 8), np.uint8), photometric="palette", colormap=colours)
    with pytest.raises(BadImage, match="has colours of the kind PALETTE; valid: levels of each channel"):
        read(data, PixelFormat(1, 8))


def test_a_strip_that_inflates_beyond_its_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    whole = encode_bands(np.zeros((64, 64, 13), np.uint16), compression="deflate")
    small = zlib.compress(np.zeros((64, 64, 13), np.uint16).tobytes(), 6)
    start = whole.index(small[:2])
    bomb = zlib.compress(b"\0" * (64 * 64 * 26 + 1))[: len(small)]
    monkeypatch.setattr("firstlight.pipeline.data.channels.tiff_samples.MAX_UNTRIED_BYTES", 0)
    assert read(whole, limit=4096).shape == (64, 64, 13)
    with pytest.raises(BadImage, match="inflates to more bytes than its pixels"):
        read(whole[:start] + bomb + whole[start + len(bomb) :], limit=4096)

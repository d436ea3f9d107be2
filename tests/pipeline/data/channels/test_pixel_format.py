"""The format of pixels: its words, its bytes, its JSON."""

import numpy as np
import pytest

from firstlight.pipeline.data.channels.pixel_format import (
    RGB_PIXELS,
    PixelFormat,
    describe_pixel_format,
    parse_pixel_format,
    state_pixel_format,
)


def test_the_default_is_red_green_and_blue_of_a_byte_each() -> None:
    assert (RGB_PIXELS.pixel_bytes, RGB_PIXELS.dtype, RGB_PIXELS.white) == (3, np.uint8, 255)
    assert state_pixel_format(None, None) is None


@pytest.mark.parametrize(
    ("channels", "bits", "words", "size"), [(13, 16, "13 channels of 16 bits", 26), (1, None, "1 channel of 8 bits", 1)]
)
def test_a_stated_format_says_itself_and_comes_back_from_json(
    channels: int, bits: int | None, words: str, size: int
) -> None:
    found = state_pixel_format(channels, bits)
    assert found is not None
    assert str(found) == words == describe_pixel_format(found.channels, found.bits)
    assert (found.pixel_bytes, found.white) == (size, 2 ** (bits or 8) - 1)
    assert parse_pixel_format(found.dump()) == found == PixelFormat(channels, bits or 8)
    assert parse_pixel_format(None) is None

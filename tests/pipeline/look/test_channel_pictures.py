"""Pictures of channels: which are shown, and that their levels fill the range of a picture."""

import numpy as np
import pytest

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.look.channel_pictures import measure_shown_levels
from tests.support.channel_images import draw_bands, encode_bands
from tests.support.dicom_files import encode_dicom


@pytest.mark.parametrize(("channels", "shown"), [(1, (0,)), (2, (0, 1, 1)), (3, (0, 1, 2)), (13, (0, 1, 2))])
def test_first_channels_are_shown_and_all_levels_are_used(channels: int, shown: tuple[int, ...]) -> None:
    # Data of 12 bits in files of 16 would be black as they are.
    values = draw_bands(0, channels) >> 4
    pixels = PixelFormat(channels, 16)
    found = measure_shown_levels(pixels, [encode_bands(values)])
    assert found.channels == shown
    picture = found.draw(encode_bands(values), 72)
    assert (picture.mode, picture.size) == ("L" if channels == 1 else "RGB", (32, 32))
    levels = np.asarray(picture).reshape(32, 32, len(shown))
    if channels != 3:
        assert (levels.min((0, 1)) == 0).all()
        assert (levels.max((0, 1)) == 255).all()
    # A channel is a rising function of its own levels.
    order = np.argsort(values[:, :, shown[-1]].ravel(), kind="stable")
    assert (np.diff(levels[:, :, -1].ravel()[order].astype(int)) >= 0).all()


def test_three_channels_have_one_range_so_that_colours_stay() -> None:
    values = np.stack([np.full((8, 8), level, np.uint16) for level in (100, 200, 300)], 2)
    values[0] = 0
    found = measure_shown_levels(PixelFormat(3, 16), [encode_bands(values)])
    assert len(set(found.white.tolist())) == 1
    red, green, blue = np.asarray(found.draw(encode_bands(values), 8))[4, 4].tolist()
    assert 0 < red < green < blue == 255
    assert found.describe() == "levels from their 2nd to their 98th percentile"


@pytest.mark.parametrize("channels", [1, 3])
def test_eight_bits_of_grey_and_colours_are_shown_as_they_are(channels: int) -> None:
    values = draw_bands(0, channels, bits=8)
    found = measure_shown_levels(PixelFormat(channels, 8), [])
    assert found.describe() == ""
    assert np.array_equal(np.atleast_3d(np.asarray(found.draw(encode_bands(values), 72))), values)


def test_captions_name_the_channels() -> None:
    found = measure_shown_levels(PixelFormat(5, 8), [encode_bands(draw_bands(0, 5, bits=8))])
    assert found.describe() == "channels 1 to 3 of 5, each from its 2nd to its 98th percentile"


def test_pictures_are_made_smaller_in_their_proportion() -> None:
    scan = encode_dicom(np.arange(200 * 50, dtype=np.uint16).reshape(50, 200))
    picture = measure_shown_levels(PixelFormat(1, 16), [scan]).draw(scan, 72)
    assert picture.size == (72, 18)
    assert np.asarray(picture)[0, 0] <= 1
    assert np.asarray(picture)[-1, -1] >= 254


def test_one_level_everywhere_is_black() -> None:
    flat = encode_bands(np.full((8, 8, 4), 900, np.uint16))
    assert not np.asarray(measure_shown_levels(PixelFormat(4, 16), [flat]).draw(flat, 8)).any()

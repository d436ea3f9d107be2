"""Headers are checked before any pixel is read."""

import pytest

from firstlight.pipeline.data.images import BadImage
from firstlight.pipeline.data.images.headers import check_pixel_count, open_file_header
from tests.support.odd_images import encode_image, make_noise


def test_limit_names_its_key() -> None:
    with pytest.raises(BadImage) as raised:
        check_pixel_count(30, 20, 599)
    assert str(raised.value) == "has 30 x 20 pixels; valid: at most 599 pixels (dataset.max_pixels)"
    assert raised.value.kind == "too large"
    check_pixel_count(30, 20, 600)
    with pytest.raises(BadImage, match="at least 1 x 1"):
        check_pixel_count(0, 20, 600)


def test_only_the_formats_that_are_asked_for_are_opened() -> None:
    data = encode_image(make_noise(), "BMP")
    assert open_file_header(data, 1000, ("PNG", "BMP")).size == (17, 24)
    for wrong in (data, b"", b"x"):
        with pytest.raises(BadImage):
            open_file_header(wrong, 1000, ("PNG",))

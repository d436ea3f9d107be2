"""The one error of decoding: its text is one line without addresses, and it says of what kind it is."""

import pytest
from PIL import Image, ImageFile

from firstlight.pipeline.data.images.bad_image import BadImage, describe_decoding_error, raise_only_bad_image


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (OSError("image file is truncated (9 bytes not processed)"), "image file is truncated", "truncated"),
        (ValueError("a\nb <_io.BytesIO object at 0x7f12>"), "a b the file", "unreadable"),
        (KeyError(), "KeyError", "unreadable"),
        (Image.DecompressionBombError("x"), "is larger than 7 pixels (dataset.max_pixels)", "too large"),
        (BadImage("is odd", "levels"), "is odd", "levels"),
    ],
)
def test_any_error_becomes_bad_image(error: Exception, text: str, kind: str) -> None:
    with pytest.raises(BadImage) as raised:
        raise_only_bad_image(lambda: fail(error), 7)
    assert str(raised.value).startswith(text)
    assert raised.value.kind == kind


def test_limits_of_pillow_hold_only_inside() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    inside = raise_only_bad_image(lambda: (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES), 10)
    assert inside == (5.0, False)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_long_reasons_are_cut() -> None:
    assert len(describe_decoding_error(ValueError("x" * 1000))) == 200

"""Colours of 16 bits a sample: both bytes are read, in every layout."""

import numpy as np
import pytest

from firstlight.pipeline.data.images import BadImage, decode_rgb, open_rgb
from tests.support.odd_images import encode_png_16, encode_tiff_16

SAMPLES = np.random.default_rng(0).integers(0, 4096, (20, 30, 3)).astype(np.uint16)
LEVELS = {"16-bit colour": (0.0, 4095.0)}
PPM = b"P6\n30 20\n65535\n" + SAMPLES.astype(">u2").tobytes()
FILES = {
    "PNG": encode_png_16(SAMPLES),
    "PPM": PPM,
    **{
        f"TIFF {order}{' deflate' if deflate else ''}": encode_tiff_16(SAMPLES, order, deflate=deflate)
        for order in "<>"
        for deflate in (False, True)
    },
}


@pytest.mark.parametrize("name", FILES)
def test_twelve_bits_in_sixteen_use_the_whole_range(name: str) -> None:
    image = open_rgb(FILES[name], levels=LEVELS)
    assert image.info["levels"] == ("16-bit colour", float(SAMPLES.min()), float(SAMPLES.max()))
    np.testing.assert_array_equal(np.asarray(image), np.rint(SAMPLES / 4095 * 255).astype(np.uint8))


@pytest.mark.parametrize("name", [name for name in FILES if name != "PPM"])
@pytest.mark.parametrize("levels", [None, {"16-bit colour": (0.0, 65535.0)}])
def test_sixteen_bits_keep_their_high_byte(name: str, levels: dict[str, tuple[float, float]] | None) -> None:
    np.testing.assert_array_equal(decode_rgb(FILES[name], levels=levels), SAMPLES >> 8)


def test_alpha_has_a_range_of_its_own() -> None:
    """Tools write opaque alpha as 65535, also beside colours of 12 bits."""
    for opaque in (4095, 65535):
        alpha = np.full((20, 30, 1), opaque, np.uint16)
        expected = np.rint(SAMPLES / 4095 * 255).astype(np.uint8)
        coloured = encode_png_16(np.concatenate([SAMPLES, alpha], 2))
        np.testing.assert_array_equal(decode_rgb(coloured, levels=LEVELS), expected)
        grey = open_rgb(encode_png_16(np.concatenate([SAMPLES[:, :, :1], alpha], 2)), levels=LEVELS)
        assert grey.info["levels"][2] == SAMPLES[:, :, 0].max()
        np.testing.assert_array_equal(np.asarray(grey), np.repeat(expected[:, :, :1], 3, 2))


@pytest.mark.parametrize("full", [4095, 65535])
def test_half_transparent_pixels_are_half_white(full: int) -> None:
    """Whatever range alpha has; the darkest pixel of the file is opaque."""
    alpha = np.full((20, 30, 1), full, np.uint16)
    alpha[10:] = (full + 1) // 2
    black = np.zeros_like(SAMPLES)
    black[0, 0] = 4095
    pixels = decode_rgb(encode_png_16(np.concatenate([black, alpha], 2)), levels=LEVELS)
    assert (pixels[1:10] == 0).all()
    assert np.abs(pixels[10:].astype(int) - 127).max() <= 1


def test_separate_planes_are_refused_not_misread() -> None:
    with pytest.raises(BadImage, match="16 bits a sample in separate planes"):
        open_rgb(encode_tiff_16(SAMPLES, planes=True))


def test_other_depths_are_not_touched() -> None:
    image = open_rgb(b"P6\n30 20\n255\n" + (SAMPLES >> 4).astype(np.uint8).tobytes())
    assert image.info == {"mode": "RGB", "format": "PPM"}
    scaled = open_rgb(b"P6\n30 20\n4095\n" + SAMPLES.astype(">u2").tobytes())
    assert np.abs(np.asarray(scaled).astype(int) - SAMPLES / 4095 * 255).max() <= 1

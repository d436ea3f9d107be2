"""Images of more than 8 bits: what is black and what is white, for one image and for a set."""

import itertools

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import BadImage, decode_rgb, open_rgb
from firstlight.pipeline.data.images.levels import (
    LevelCounts,
    check_depth,
    check_not_dark,
    decide_level_range,
    find_exponent,
    find_level_kind,
    list_depth_ranges,
    list_pixel_readings,
    scale_to_8_bits,
)
from tests.support.odd_images import encode_image


@pytest.mark.parametrize(
    ("kind", "low", "high", "depth", "expected"),
    [
        ("16-bit grey", 0, 1023, None, (0, 1023)),
        ("16-bit grey", 5, 1000, None, (0, 1023)),
        ("16-bit grey", 0, 1024, None, (0, 2047)),
        ("16-bit grey", 0, 4095, None, (0, 4095)),
        ("16-bit grey", 0, 16383, None, (0, 16383)),
        ("16-bit grey", 0, 65535, None, (0, 65535)),
        ("16-bit grey", 0, 200, None, (0, 255)),
        ("16-bit grey", 0, 0, None, (0, 255)),
        ("16-bit grey", 0, 700, 12, (0, 4095)),
        ("integers", 0, 100_000, None, (0, 131071)),
        ("integers", -1024, 3071, None, (-1024, 3071)),
        ("integers", -1024, 1000, 12, (-2048, 2047)),
        ("floats", 0.0, 1.0, None, (0, 1)),
        ("floats", 0.1, 0.6, None, (0, 1)),
        ("floats", 0.0, 0.0625, None, (0, 0.0625)),
        ("floats", 0.0, 1.003, None, (0, 1.003)),
        ("floats", 0.0, 4095.0, None, (0, 4095)),
        ("floats", -2.5, 4.0, 12, (-2.5, 4)),
    ],
)
def test_range_of_a_set(kind: str, low: float, high: float, depth: int | None, expected: tuple[float, float]) -> None:
    assert decide_level_range(kind, low, high, depth) == expected


@pytest.mark.parametrize("bits", [9, 10, 11, 12, 14, 15, 16])
@pytest.mark.parametrize(("kind", "kind_name"), [("PNG", "16-bit grey"), ("TIFF", "16-bit grey"), ("I", "integers")])
def test_no_depth_becomes_black(bits: int, kind: str, kind_name: str) -> None:
    """Data of any depth use the whole range, to within rounding."""
    values = np.linspace(0, 2**bits - 1, 300).astype(np.uint16).reshape(15, 20)
    data = encode_image(values.astype(np.int32), "TIFF") if kind == "I" else encode_image(values, kind)
    _, low, high = open_rgb(data).info["levels"]
    pixels = decode_rgb(data, levels={kind_name: decide_level_range(kind_name, low, high, None)})[:, :, 0]
    assert np.abs(pixels - values / (2**bits - 1) * 255).max() <= 0.5 + 1e-9
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("factor", [1.0, 4095.0, 1 / 65535 * 4095, 300.0])
def test_floats_of_any_range_are_not_black(factor: float) -> None:
    values = (np.linspace(0, 1, 300) * factor).astype(np.float32).reshape(15, 20)
    data = encode_image(values, "TIFF")
    _, low, high = open_rgb(data).info["levels"]
    pixels = decode_rgb(data, levels={"floats": decide_level_range("floats", low, high, None)})[:, :, 0]
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_signed_sixteen_bits_are_scaled_alike_in_all_images() -> None:
    """A level has one grey in the whole set, also in an image that has no negative level."""
    levels = {"integers": decide_level_range("integers", -1000, 3000, None)}
    grey = [
        decode_rgb(encode_image(np.array([values], np.int32), "TIFF"), levels=levels)[0, :, 0].tolist()
        for values in ([-1000, 0, 3000], [0, 1000, 2000])
    ]
    assert grey == [[0, 64, 255], [64, 128, 191]]


def test_set_says_which_images_are_flat_or_dark() -> None:
    counts = LevelCounts()
    for low, high in ((0, 4095), (100, 103), (7, 7), (0, 100), (0, 65535)):
        counts.add_image(low, high)
    assert (counts.images, counts.low, counts.high) == (5, 0, 65535)
    # Levels 100 to 103 of 65536 are one grey, and so is 7; of 4096 only 7 is.
    assert (counts.count_flat(0, 65535), counts.count_dark(0, 65535)) == (3, 4)
    assert (counts.count_flat(0, 4095), counts.count_dark(0, 4095)) == (2, 3)
    assert counts.count_dark(-10, 4095) == 0
    other = LevelCounts()
    other.merge_counts(counts.dump_counts())
    other.merge_counts(counts.dump_counts())
    assert (other.images, other.count_flat(0, 65535), other.high) == (10, 6, 65535)


def test_exponent_is_the_number_of_bits() -> None:
    assert [find_exponent(value) for value in (1, 255, 256, 4095, 65535)] == [1, 8, 9, 12, 16]
    assert [find_exponent(value) for value in (0.5, 0.0625, 0.06)] == [0, -3, -4]
    assert find_exponent(0) == find_exponent(-3) < find_exponent(1e-300)


@pytest.mark.parametrize(
    ("low", "high", "depth", "problem"),
    [
        (0, 4095, 12, None),
        (0, 4096, 12, "has the level 4096; dataset.depth: 12 bits hold 0 to 4095"),
        (-2048, 2047, 12, None),
        (-2049, 5, 12, "has the level -2049; dataset.depth: 12 bits hold -2048 to 2047"),
    ],
)
def test_levels_beyond_the_stated_depth_are_refused(low: float, high: float, depth: int, problem: str | None) -> None:
    if problem is None:
        check_depth("integers", low, high, depth)
    else:
        with pytest.raises(BadImage) as raised:
            check_depth("16-bit grey", low, high, depth)
        assert str(raised.value) == problem
    check_depth("floats", low, high, depth)


def test_single_image_of_unknown_depth_is_not_read_as_black() -> None:
    check_not_dark("16-bit grey", 0, 4096)
    check_not_dark("integers", -5, 100)
    for kind, high, advice in (
        ("16-bit grey", 1023, "depth=10"),
        ("16-bit colour", 100, "depth=8"),
        ("floats", 0.05, "1 is"),
    ):
        with pytest.raises(BadImage, match=advice):
            check_not_dark(kind, 0, high)


def test_ranges_of_a_depth_are_those_of_integers() -> None:
    assert list_depth_ranges(None) == {}
    assert list_depth_ranges(10) == dict.fromkeys(("16-bit grey", "16-bit colour", "integers"), (0.0, 1023.0))


def test_modes_of_eight_bits_have_no_levels() -> None:
    assert [find_level_kind(mode) for mode in ("L", "RGB", "P", "1", "CMYK")] == [None] * 5
    assert [find_level_kind(mode) for mode in ("I;16", "I;16B", "I", "F")] == [
        "16-bit grey",
        "16-bit grey",
        "integers",
        "floats",
    ]


def test_scaling_is_that_of_one_block_and_clips() -> None:
    values = np.random.default_rng(0).integers(-500, 70_000, (1500, 1400)).astype(np.int32)
    expected = np.rint(np.clip(values / 65535 * 255, 0, 255)).astype(np.uint8)
    np.testing.assert_array_equal(scale_to_8_bits(values, 0.0, 65535.0), expected)
    assert scale_to_8_bits(np.full((2, 2), 7), 7.0, 7.0).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((4, 4, 3), 7), ("one_colour",)),
        (np.full((4, 4, 3), (255, 0, 9)), ("one_colour",)),
        (np.full((1, 1, 3), 255), ("one_colour",)),
        (np.arange(48).reshape(4, 4, 3) % 32, ("dark",)),
        (np.arange(48).reshape(4, 4, 3) % 33, ()),
    ],
)
def test_odd_pixels_are_reported(pixels: np.ndarray, expected: tuple[str, ...]) -> None:
    assert list_pixel_readings(Image.fromarray(pixels.astype(np.uint8))) == expected


def test_one_different_pixel_is_enough() -> None:
    for row, column, channel in itertools.product(range(3), range(3), range(3)):
        pixels = np.full((3, 3, 3), 100, np.uint8)
        pixels[row, column, channel] = 101
        assert list_pixel_readings(Image.fromarray(pixels)) == ()

"""JPEG files decoded directly have the pixels of Pillow, and are refused as by Pillow, whatever their bytes are."""

import io
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import BadImage, open_rgb
from firstlight.pipeline.data.images.plain_jpeg import decode_plain_jpeg, open_simple_jpeg
from tests.support.paths import SHARED_DATA
from tests.support.photograph_folders import make_photograph

DECODE = "firstlight.pipeline.data.images.decode"
PHOTOGRAPHS = SHARED_DATA / "photos"
needs_photographs = pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs of shared/data are not here")


def encode(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def decode_directly(data: bytes, least_side: int | None = None) -> Image.Image | None:
    return decode_plain_jpeg(data, Image.open(io.BytesIO(data)), least_side)


def describe_outcome(data: bytes) -> tuple[object, ...]:
    """The pixels and facts of an image, or the reason why it is none."""
    try:
        image = open_rgb(data, 1_000_000)
    except BadImage as error:
        return error.kind, str(error)
    return image.size, image.tobytes(), image.info


def describe_pillow_outcome(data: bytes) -> tuple[object, ...]:
    with (
        patch(f"{DECODE}.decode_plain_jpeg", return_value=None),
        patch(f"{DECODE}.open_simple_jpeg", return_value=None),
    ):
        return describe_outcome(data)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (17, 23), (64, 48), (161, 121)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4", "quality": 95},
        {"subsampling": "4:2:2", "quality": 75},
        {"subsampling": "4:2:0", "quality": 30},
        {"subsampling": "4:1:1"},
        {"progressive": True, "quality": 90},
        {"optimize": True, "restart_marker_blocks": 2},
        {"keep_rgb": True},
    ],
)
def test_pixels_are_those_of_pillow(size: tuple[int, int], options: dict[str, Any]) -> None:
    data = encode(make_photograph(*size), **options)
    direct = decode_directly(data)
    assert direct is not None
    np.testing.assert_array_equal(np.asarray(direct), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert describe_outcome(data) == describe_pillow_outcome(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_grey_and_turned_files_are_read_as_by_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in (make_photograph(33, 20), make_photograph(33, 20).convert("L")):
        data = encode(image, exif=exif)
        assert decode_directly(data) is not None
        assert describe_outcome(data) == describe_pillow_outcome(data)


def test_files_of_other_kinds_are_left_to_pillow() -> None:
    assert decode_directly(encode(make_photograph(20, 20).convert("CMYK"))) is None
    file = io.BytesIO()
    make_photograph(20, 20).save(file, "PNG")
    assert decode_directly(file.getvalue()) is None
    whole = encode(make_photograph(20, 20))
    assert decode_directly(whole) is not None
    assert decode_directly(whole[:-30]) is None


def test_simple_files_are_those_without_anything_of_note() -> None:
    plain, grey = encode(make_photograph(40, 30)), encode(make_photograph(40, 30).convert("L"))
    for data, mode in ((plain, "RGB"), (grey, "L"), (encode(make_photograph(40, 30), progressive=True), "RGB")):
        found = open_simple_jpeg(data, 1200)
        assert found is not None
        assert found.info == {"mode": mode, "format": "JPEG"}
        assert open_simple_jpeg(data, 1199) is None
    exif = Image.Exif()
    exif[0x0112] = 1
    for data in (
        encode(make_photograph(40, 30), exif=exif),
        encode(make_photograph(40, 30), keep_rgb=True),
        plain[:-30],
        plain[:9],
        b"",
    ):
        assert open_simple_jpeg(data, 1200) is None


def test_least_side_halves_an_image_and_tells_its_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_photograph(640, 480), quality=95, exif=exif)
    image = open_rgb(data, least_side=240)
    assert (image.size, image.info["size"]) == ((240, 320), (480, 640))
    whole = open_rgb(data).resize((240, 320), Image.Resampling.BOX)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(whole)).mean() < 1.0
    assert open_rgb(data, least_side=481).size == (480, 640)
    assert "size" not in open_rgb(data, least_side=481).info


@needs_photographs
def test_photographs_have_the_pixels_of_pillow() -> None:
    files = sorted(PHOTOGRAPHS.iterdir())[::7]
    contents = [file.read_bytes() for file in files]
    assert sum(decode_directly(data) is not None for data in contents) > 0.9 * len(contents)
    assert all(describe_outcome(data) == describe_pillow_outcome(data) for data in contents)


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes, removes, repeats or inserts some bytes, or cuts the end off."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(0, len(found)))
        length = int(rng.integers(1, 1 + min(40, len(found) - place)))
        match int(rng.integers(0, 5)):
            case 0:
                found[place] = int(rng.integers(0, 256))
            case 1:
                found[place : place + length] = rng.bytes(length)
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = found[max(0, place - length) : place]
            case 4 if rng.random() < 0.3:
                del found[max(place, 2) :]
    return bytes(found)


def check_mutations(count: int) -> int:
    """Compares mutated files with Pillow; returns how many of them were decoded directly."""
    rng, direct = np.random.default_rng(count), 0
    originals = [
        encode(make_photograph(40, 30), quality=90),
        encode(make_photograph(33, 47), subsampling="4:2:0", restart_marker_blocks=3),
        encode(make_photograph(40, 30), progressive=True),
        encode(make_photograph(24, 24).convert("L")),
        encode(make_photograph(24, 24), keep_rgb=True),
    ]
    for number in range(count):
        data = mutate_bytes(originals[number % len(originals)], rng)
        assert describe_outcome(data) == describe_pillow_outcome(data), number
        try:
            direct += decode_directly(data) is not None
        except Exception:
            continue
    return direct


def test_mutated_files_have_the_pixels_or_the_reason_of_pillow() -> None:
    assert 10 < check_mutations(600) < 590


@pytest.mark.slow
def test_ten_thousand_mutated_files_have_the_pixels_or_the_reason_of_pillow() -> None:
    assert 200 < check_mutations(10_000) < 9_900

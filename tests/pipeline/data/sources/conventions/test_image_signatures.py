"""Images are known by their first bytes; texts and other files that begin alike are not taken for images."""

import io

import pytest
from PIL import Image

from firstlight.pipeline.data.sources.conventions.image_signatures import (
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    SIGNATURE_BYTES,
    find_ending,
    is_image_start,
)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO"])
def test_every_format_is_known_by_its_bytes(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 90)).save(file, kind)
    assert is_image_start(file.getvalue()[:SIGNATURE_BYTES])


@pytest.mark.parametrize(
    "start",
    [
        b"\0\0\0\x20ftypheic\0\0\0\0mif1heic",
        b"\0\0\0\x0cJXL \r\n\x87\n",
        b"\xff\x0a" + bytes(62),
        bytes(128) + b"DICM",
    ],
)
def test_formats_of_extras_are_known_by_their_bytes(start: bytes) -> None:
    assert is_image_start(start.ljust(SIGNATURE_BYTES, b"\0"))


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"P",
        b"PK\x03\x04",
        b"BMW is a car, and this is a text about it that goes on for a while, a whole line or more",
        b"P5x",
        b"GIF99",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"\0\0\0\x20ftypmp42\0\0\0\0mp42isom",
        b"<!DOCTYPE html>",
        b"\xff\x0a",
        bytes(127) + b"DICM",
    ],
)
def test_other_bytes_are_no_image(start: bytes) -> None:
    assert not is_image_start(start)


def test_endings() -> None:
    assert [find_ending(name) for name in ("a/B.JPG", "x.jpg.1", "x.jpg?w=300", ".hidden", "none")] == [
        ".jpg",
        ".1",
        ".jpg?w=300",
        "",
        "",
    ]
    assert not OTHER_SUFFIXES & set(IMAGE_SUFFIXES)

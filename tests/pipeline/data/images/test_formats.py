"""Formats by their first bytes, and the size that a file declares."""

import struct

import pytest

from firstlight.pipeline.data.images import BadImage, open_rgb
from firstlight.pipeline.data.images.formats import (
    HEIC_EXTRA,
    JXL_CODESTREAM,
    JXL_CONTAINER,
    JXL_EXTRA,
    FormatExtra,
    find_declared_size,
    find_format_extra,
    register_format,
)
from tests.support.odd_images import encode_image, make_noise

KINDS = ("PNG", "WEBP", "BMP", "AVIF", "JPEG2000")


def make_brands(*brands: bytes) -> bytes:
    return struct.pack(">I", 12 + 4 * len(brands)) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:]) + bytes(40)


@pytest.mark.parametrize(
    ("start", "needed"),
    [
        (make_brands(b"heic", b"mif1", b"heic"), HEIC_EXTRA),
        (make_brands(b"mif1", b"heic", b"miaf"), HEIC_EXTRA),
        (make_brands(b"hevc"), HEIC_EXTRA),
        (make_brands(b"mif1", b"avif", b"miaf"), None),
        (make_brands(b"avis", b"msf1"), None),
        (make_brands(b"isom", b"mp42"), None),
        (JXL_CODESTREAM + bytes(30), JXL_EXTRA),
        (JXL_CONTAINER + bytes(30), JXL_EXTRA),
        (b"\xff\xd8\xff\xe0" + bytes(30), None),
        (b"", None),
    ],
)
def test_formats_that_need_an_extra_are_known_by_their_bytes(start: bytes, needed: FormatExtra | None) -> None:
    assert find_format_extra(start) is needed


@pytest.mark.parametrize("needed", [HEIC_EXTRA, JXL_EXTRA])
def test_missing_extra_is_named(needed: FormatExtra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstlight.pipeline.data.images.formats.Image.OPEN", {})
    monkeypatch.setitem(__import__("sys").modules, needed.module, None)
    data = make_brands(b"heic") if needed is HEIC_EXTRA else JXL_CODESTREAM + bytes(30)
    with pytest.raises(BadImage) as raised:
        open_rgb(data)
    assert str(raised.value) == (f"is {needed.name}, which needs an extra: pip install 'firstlight[{needed.extra}]'")
    assert raised.value.kind == "needs an extra"
    assert not register_format(needed)


@pytest.mark.parametrize("needed", [HEIC_EXTRA, JXL_EXTRA])
def test_extra_reads_its_format(needed: FormatExtra) -> None:
    pytest.importorskip(needed.module)
    assert register_format(needed)
    data = encode_image(make_noise(), needed.pillow_format)
    image = open_rgb(data)
    assert (image.size, image.info["format"]) == ((17, 24), needed.pillow_format)
    with pytest.raises(BadImage, match=r"dataset\.max_pixels"):
        open_rgb(data, 17 * 24 - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_declared_size_is_that_of_a_whole_file(kind: str) -> None:
    data = encode_image(make_noise(), kind)
    assert find_declared_size(data) == len(data)
    assert find_declared_size(data[:-10]) > len(data) - 10
    assert find_declared_size(b"\xff\xd8\xff") == 0


@pytest.mark.parametrize("kind", [*KINDS, "TIFF", "GIF", "JPEG", "PPM"])
def test_cut_off_files_are_distinguished_from_unreadable_ones(kind: str) -> None:
    data = encode_image(make_noise(80, 80), kind)
    with pytest.raises(BadImage) as raised:
        open_rgb(data[: int(len(data) * 0.7)])
    assert "truncated" in str(raised.value)
    assert raised.value.kind == "truncated"

"""Thousands of broken files, drawn from a seed, are images or `BadImage`, without output and in little memory.

`FUZZ=100000 pytest tests/integration/test_images_fuzz.py` tries more of them.
"""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import BadImage, decode_rgb, open_rgb
from tests.support.odd_images import encode_png_16, encode_tiff_16, make_large_texts, make_png_chunk

COUNT = int(os.environ.get("FUZZ", "10000"))
CAP = 1_000_000  # pixels
GROWTH = 200e6  # bytes
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
Random = np.random.Generator


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def samples() -> list[bytes]:
    """Every format in the modes and layouts that it can have."""
    pixels = np.random.default_rng(0).integers(0, 255, (19, 26, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    alpha = photo.copy()
    alpha.putalpha(photo.convert("L"))
    frames = {"save_all": True, "append_images": [photo.rotate(90)]}
    jpeg = [
        save(photo, "JPEG", progressive=True, exif=exif),
        save(photo.convert("L"), "JPEG"),
        save(photo.convert("CMYK"), "JPEG"),
    ]
    png = [
        save(image, "PNG")
        for image in (photo, alpha, deep, photo.convert("P"), photo.convert("1"), photo.convert("LA"))
    ]
    tiff = [
        save(photo, "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    tiff += [
        save(image, "TIFF") for image in (deep, photo.convert("F"), photo.convert("CMYK"), photo.convert("I"), alpha)
    ] + [tiled(64)]
    webp = [save(photo, "WEBP"), save(alpha, "WEBP", lossless=True), save(photo, "WEBP", **frames)]
    gif = [save(photo, "GIF"), save(photo, "GIF", **frames), save(photo.convert("P"), "GIF", transparency=3)]
    bmp = [save(image, "BMP") for image in (photo, photo.convert("P"), photo.convert("1"))]
    avif = [save(photo, "AVIF", exif=exif), save(alpha, "AVIF"), save(photo, "AVIF", **frames)]
    jpeg2000 = [save(image, "JPEG2000") for image in (photo, alpha, photo.convert("L"), deep)]
    jpeg2000.append(save(photo, "JPEG2000", no_jp2=True, tile_size=(16, 16)))
    wide = pixels.astype(np.uint16) * 16
    colours = [encode_png_16(wide), encode_png_16(wide[:, :, :2]), encode_png_16(np.dstack([wide, wide[:, :, :1]]))]
    colours += [encode_tiff_16(wide, order, deflate=deflate) for order in "<>" for deflate in (False, True)]
    return [
        *avif,
        *jpeg2000,
        *colours,
        save(photo, "PNG", **make_large_texts("text")),
        *jpeg,
        save(photo, "JPEG"),
        *png,
        interlaced(pixels),
        *tiff,
        *webp,
        *gif,
        *bmp,
        save(photo, "PPM"),
        save(deep, "PPM"),
    ]


def interlaced(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG in the seven passes of Adam7, which Pillow reads but does not write."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, down, right in passes for row in pixels[y::down, x::right])
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_png_chunk(b"IHDR", header)
        + make_png_chunk(b"IDAT", zlib.compress(rows))
        + make_png_chunk(b"IEND", b"")
    )


def tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 grey pixels, the corner of one tile of `side` x `side`, all of them 7."""
    data = zlib.compress(b"\7" * side * side, 9)
    tags = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, side),
        (323, side),
        (324, 8),
        (325, len(data)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", 0)
    )


def flip(data: np.ndarray, other: np.ndarray, random: Random) -> np.ndarray:
    places = random.integers(0, len(data), random.integers(1, 20))
    data[places] ^= np.uint8(1) << random.integers(0, 8, len(places), dtype=np.uint8)
    return data


def cut(data: np.ndarray, other: np.ndarray, random: Random) -> np.ndarray:
    return data[: random.integers(0, len(data))]


def splice(data: np.ndarray, other: np.ndarray, random: Random) -> np.ndarray:
    return np.concatenate([data[: random.integers(1, len(data))], other[random.integers(0, len(other)) :]])


def repeat(data: np.ndarray, other: np.ndarray, random: Random) -> np.ndarray:
    start, stop = np.sort(random.integers(0, len(data) + 1, 2))
    return np.concatenate([data[:stop], *[data[start:stop]] * int(random.integers(1, 6)), data[stop:]])


def drop(data: np.ndarray, other: np.ndarray, random: Random) -> np.ndarray:
    start, stop = np.sort(random.integers(0, len(data) + 1, 2))
    return np.delete(data, slice(start, stop)) if stop - start < len(data) else data[:1]


def header(data: np.ndarray, other: np.ndarray, random: Random) -> np.ndarray:
    """Extreme numbers where sizes, counts and offsets are, of 1, 2 or 4 bytes in either order."""
    encoded = bytearray(data.tobytes())
    for _ in range(random.integers(1, 4)):
        width, order = int(random.choice([1, 2, 4])), str(random.choice(["<", ">"]))
        value = struct.pack(f"{order}I", int(random.choice(EXTREMES)))
        place = int(random.integers(0, min(len(encoded), int(random.choice([64, 200, len(encoded)])))))
        encoded[place : place + width] = value[:width] if order == "<" else value[4 - width :]
    return np.frombuffer(bytes(encoded), np.uint8)


def scratch(data: np.ndarray, other: np.ndarray, random: Random) -> np.ndarray:
    start = data[: random.integers(0, 40)]
    return np.concatenate([start, random.integers(0, 256, random.integers(0, 600), dtype=np.uint8)])


MUTATIONS: tuple[Callable[[np.ndarray, np.ndarray, Random], np.ndarray], ...] = (
    flip,
    cut,
    splice,
    repeat,
    drop,
    header,
    header,
    scratch,
)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_samples_are_images() -> None:
    for data in samples():
        assert decode_rgb(data).shape in {(19, 26, 3), (26, 19, 3), (16, 16, 3)}


@pytest.mark.fault(25, "mutated files")
@pytest.mark.fault(26, "mutated PNGs, in a process of their own")
def test_mutated_files_are_images_or_bad_images(capfd: pytest.CaptureFixture[str]) -> None:
    random, whole = np.random.default_rng(2), [np.frombuffer(data, np.uint8) for data in samples()]
    good, reasons, before, worst = 0, set(), resident(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(COUNT):
            data, other = whole[k % len(whole)].copy(), whole[random.integers(len(whole))]
            encoded = MUTATIONS[random.integers(len(MUTATIONS))](data, other, random).tobytes()
            try:
                pixels = decode_rgb(encoded, CAP)
            except BadImage as error:
                reasons.add(str(error))
            else:
                assert (pixels.dtype, pixels.shape[2:]) == (np.uint8, (3,))
                assert 0 < pixels.shape[0] * pixels.shape[1] <= CAP
                good += 1
            worst = max(worst, resident())
    assert worst - before < GROWTH
    assert all(reason and reason == " ".join(reason.split()) and " at 0x" not in reason for reason in reasons)
    assert COUNT * 0.1 < good < COUNT * 0.9  # neither all harmless nor all hopeless
    assert capfd.readouterr() == ("", "")


def test_an_interlaced_png_has_its_pixels() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (13, 21, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_rgb(interlaced(pixels)), pixels)


def test_a_progressive_jpeg_has_the_pixels_of_a_sequential_one() -> None:
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 255, (33, 21, 3), dtype=np.uint8))
    np.testing.assert_array_equal(decode_rgb(save(photo, "JPEG", progressive=True)), decode_rgb(save(photo, "JPEG")))


def test_size_limit_counts_whole_tiles() -> None:
    """A corner of 16 x 16 pixels of a tile that would take gigabytes."""
    np.testing.assert_array_equal(decode_rgb(tiled(256), 256), np.full((16, 16, 3), 7))
    assert len(tiled(2048)) < 10_000
    with pytest.raises(BadImage, match="tiles of 2048 x 2048 pixels"):
        open_rgb(tiled(2048), CAP)


def gif_header(screen: int, frame: int) -> bytes:
    data = bytearray(save(Image.new("L", (8, 8)), "GIF"))
    place = data.index(b",", 13 + 3 * (2 << (data[10] & 7)))  # behind the colours: the frame
    data[6:10], data[place + 5 : place + 9] = struct.pack("<HH", screen, screen), struct.pack("<HH", frame, frame)
    return bytes(data)


@pytest.mark.fault(27, "bombs of every format, in little memory")
@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n"
        + make_png_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
        + make_png_chunk(b"IDAT", zlib.compress(bytes(10**6))),
        gif_header(65_535, 8),
        gif_header(8, 65_535),
        b"P6 1000000000 1000000000 255\n" + bytes(100),
    ],
    ids=["PNG", "GIF screen", "GIF frame", "PPM"],
)
def test_bombs_are_refused_before_they_are_decoded(data: bytes) -> None:
    before = resident()
    with pytest.raises(BadImage, match="64000000 pixels"):
        open_rgb(data)
    assert resident() - before < 20e6


def test_sixteen_bits_are_scaled_in_little_memory() -> None:
    values = np.random.default_rng(3).integers(0, 2**16, (1500, 1400), dtype=np.uint16)  # more than one block
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode_rgb(save(Image.fromarray(values), "PNG"))[:, :, 1], expected)

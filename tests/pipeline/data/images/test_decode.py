"""Every mode is decoded to its pixel values; any other bytes raise BadImage and nothing else."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from firstlight.pipeline.data.images import BadImage, decode_rgb, open_rgb
from tests.support.odd_images import make_png_chunk

GRID = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + make_png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 17, 3), dtype=np.uint8))
SAMPLES = {kind: encode(PHOTO, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")}


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_exact_pixels(kind: str) -> None:
    image = open_rgb(encode(Image.fromarray(GRID), kind))
    assert (image.mode, image.size, image.info) == ("RGB", (4, 4), {"mode": "RGB", "format": kind})
    np.testing.assert_array_equal(np.asarray(image), GRID)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_give_the_pixels_nearly(kind: str) -> None:
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(decode_rgb(encode(Image.fromarray(flat), kind)).astype(int) - flat).max() <= 4


@pytest.mark.fault(29, "1 bit, grey, palette")
def test_one_bit_grey_and_palette_become_rgb() -> None:
    grey = GRID[:, :, 0]
    np.testing.assert_array_equal(decode_rgb(encode(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, 2))
    bits = (grey > 100).astype(np.uint8) * 255
    np.testing.assert_array_equal(
        decode_rgb(encode(Image.fromarray(bits).convert("1"))), np.repeat(bits[:, :, None], 3, 2)
    )
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 250, 240, 230])
    np.testing.assert_array_equal(decode_rgb(encode(palette)), [[[10, 20, 30], [250, 240, 230]]])


@pytest.mark.fault(29, "transparency")
def test_transparent_pixels_are_blended_on_white() -> None:
    rgba = np.array([[[100, 0, 0, 0], [100, 0, 0, 255], [100, 0, 0, 51]]], np.uint8)  # 51 = 20 %
    np.testing.assert_allclose(
        decode_rgb(encode(Image.fromarray(rgba))), [[[255, 255, 255], [100, 0, 0], [224, 204, 204]]], atol=1
    )
    la = np.array([[[100, 0], [100, 255]]], np.uint8)
    np.testing.assert_array_equal(decode_rgb(encode(Image.fromarray(la, "LA"))), [[[255] * 3, [100] * 3]])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 250, 240, 230])
    np.testing.assert_array_equal(decode_rgb(encode(palette, transparency=0)), [[[255, 255, 255], [250, 240, 230]]])
    np.testing.assert_array_equal(
        decode_rgb(encode(Image.fromarray(la[:, :, 0]), transparency=100)), np.full((1, 2, 3), 255)
    )


@pytest.mark.fault(29, "16 bits")
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    deep = np.array([[0, 257, 25700, 65535]], np.uint16)
    np.testing.assert_array_equal(decode_rgb(encode(Image.fromarray(deep), kind))[0, :, 1], [0, 1, 100, 255])


@pytest.mark.fault(29, "32 bits")
def test_32_bit_integers_and_floats_are_scaled() -> None:
    def values(array: np.ndarray) -> list[int]:
        return decode_rgb(encode(Image.fromarray(array), "TIFF"))[0, :, 0].tolist()

    assert values(np.array([[0, 25700, 65535]], np.int32)) == [0, 100, 255]  # 16 bit in 32
    assert values(np.array([[-100, 0, 100000]], np.int32)) == [0, 0, 255]  # its own range
    assert values(np.array([[0.0, 0.2, 1.0]], np.float32)) == [0, 51, 255]
    assert values(np.array([[100.0, 150.0, 200.0]], np.float32)) == [0, 128, 255]
    assert values(np.array([[7.0, 7.0]], np.float32)) == [0, 0]
    for bad in (np.nan, np.inf):
        with pytest.raises(BadImage, match="not finite"):
            values(np.array([[0.0, bad]], np.float32))


@pytest.mark.fault(29, "CMYK")
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    ink = Image.fromarray(np.tile(np.array([0, 255, 255, 0], np.uint8), (16, 16, 1)), "CMYK")  # magenta + yellow = red
    data = encode(ink, kind)
    assert open_rgb(data).info["mode"] == "CMYK"
    assert np.abs(decode_rgb(data).astype(int) - [255, 0, 0]).max() <= 6
    if kind == "JPEG":
        assert b"Adobe" in data  # so that its inks are stored inverted


@pytest.mark.parametrize(
    ("orientation", "turned"), [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))]
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int, turned) -> None:  # type: ignore[no-untyped-def]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(
        decode_rgb(encode(Image.fromarray(GRID[:2]), kind, exif=exif, **options)), turned(GRID[:2])
    )


ZERO_DENOMINATOR = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\x01\0\0\0\0"


@pytest.mark.fault(30, "broken EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", ZERO_DENOMINATOR])
def test_broken_exif_is_ignored(exif: bytes) -> None:
    np.testing.assert_array_equal(decode_rgb(encode(PHOTO, "JPEG", exif=exif)), decode_rgb(SAMPLES["JPEG"]))


@pytest.mark.fault(31, "an animation")
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_array_equal(decode_rgb(data), np.full((8, 8, 3), (255, 0, 0)))


@pytest.mark.fault(28, "1 x 1 and 1 x 5,000 pixels")
def test_extreme_shapes_are_decoded() -> None:
    for shape in ((1, 1), (1, 5000), (5000, 1)):
        assert decode_rgb(encode(Image.new("RGB", shape[::-1]))).shape == (*shape, 3)


@pytest.mark.fault(31, "bytes behind the end")
def test_bytes_after_the_image_are_accepted() -> None:
    np.testing.assert_array_equal(decode_rgb(SAMPLES["PNG"] + b"junk" * 10), np.asarray(PHOTO))


@pytest.mark.fault(25, "empty files and garbage")
@pytest.mark.parametrize(
    "data", [b"", b"\0", b"garbage" * 50, b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0", SAMPLES["PNG"][:40]]
)
def test_bytes_without_image_raise_bad_image(data: bytes) -> None:
    with pytest.raises(BadImage) as raised:
        open_rgb(data)
    assert str(raised.value)
    assert "\n" not in str(raised.value)
    assert " at 0x" not in str(raised.value)  # reasons do not differ from run to run


@pytest.mark.fault(25, "images cut at any length")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "PPM"])
def test_truncated_images_are_refused(kind: str) -> None:
    data = SAMPLES[kind]
    for length in range(0, int(len(data) * 0.9), 7):
        with pytest.raises(BadImage):
            open_rgb(data[:length])


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_truncated_images_are_refused_or_whole(kind: str) -> None:
    data, refused = SAMPLES[kind], 0
    for length in range(0, len(data), 7):
        try:
            assert open_rgb(data[:length]).size == PHOTO.size
        except BadImage:
            refused += 1
    assert refused * 7 > len(data) * 0.9


@pytest.mark.fault(26, "any bit of a PNG")
def test_a_flipped_bit_of_a_png_never_changes_pixels_silently() -> None:
    data, refused = SAMPLES["PNG"], 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1
        try:
            np.testing.assert_array_equal(decode_rgb(bytes(flipped)), np.asarray(PHOTO))
        except BadImage:
            refused += 1
    assert refused > 0.95 * len(
        data
    )  # all but what carries no pixels: the end mark, the checksums that zlib's own stands in for


@pytest.mark.fault(26, "the checksum of a PNG's header")
def test_wrong_checksum_of_the_header_is_refused() -> None:
    data = bytearray(SAMPLES["PNG"])
    data[29] ^= 1  # signature 8, length 4, name 4, header 13: then its checksum
    with pytest.raises(BadImage):
        open_rgb(bytes(data))


@pytest.mark.fault(27, "a header of 20,000 x 20,000 pixels")
@pytest.mark.parametrize("size", [(20000, 20000), (10000, 10000)])
def test_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    bomb = png_header(*size) + make_png_chunk(b"IDAT", zlib.compress(bytes(1000))) + make_png_chunk(b"IEND", b"")
    assert len(bomb) < 500
    with pytest.raises(BadImage, match="64000000 pixels"):
        open_rgb(bomb)


@pytest.mark.parametrize("kind", list(SAMPLES))
def test_pixel_cap_is_exact(kind: str) -> None:
    pixels = PHOTO.width * PHOTO.height
    assert open_rgb(SAMPLES[kind], pixels).size == PHOTO.size
    with pytest.raises(BadImage, match=f"{pixels - 1} pixels"):
        open_rgb(SAMPLES[kind], pixels - 1)


@pytest.mark.parametrize("limit", [1, None])
def test_pillow_settings_of_the_process_do_not_matter(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for data in SAMPLES.values():
        assert open_rgb(data).size == PHOTO.size
    for bad in (SAMPLES["JPEG"][:-300], png_header(20000, 20000)):
        with pytest.raises(BadImage):
            open_rgb(bad)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", list(SAMPLES))
def test_mutations_give_an_image_or_bad_image(kind: str) -> None:
    random = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's complaints about broken files stay inside
        for _ in range(300):
            data = np.frombuffer(SAMPLES[kind], np.uint8).copy()
            places = random.integers(0, min(len(data), random.choice([32, 200, len(data)])), random.integers(1, 12))
            data[places] = random.integers(0, 256, len(places))
            try:
                image = open_rgb(data.tobytes(), 1_000_000)
            except BadImage:
                continue
            assert image.mode == "RGB"
            assert image.width * image.height <= 1_000_000
            assert np.asarray(image).dtype == np.uint8


@pytest.mark.fault(25, "any bytes")
@given(st.binary(max_size=400), st.sampled_from([b"", *(data[:12] for data in SAMPLES.values())]))
def test_any_bytes_give_an_image_or_bad_image(data: bytes, start: bytes) -> None:
    try:
        pixels = decode_rgb(start + data, 1_000_000)
    except BadImage:
        return
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)

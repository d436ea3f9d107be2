"""Files that Pillow refuses though their pixels are whole, and files that only look so."""

import io
import resource
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from firstlight.pipeline.data.images import BadImage, decode_rgb, open_rgb, read_header_frame
from tests.support.odd_images import encode_image, make_large_texts, make_noise, make_png_chunk

PHOTO = make_noise(64, 48)
SMOOTH = make_noise(5, 4).resize((90, 70), Image.Resampling.BICUBIC)
JPEGS = {
    f"{name} {kind}": encode_image(image.convert(mode), "JPEG", **options)
    for name, image in (("noise", PHOTO), ("smooth", SMOOTH))
    for kind, mode, options in (
        ("colour", "RGB", {}),
        ("grey", "L", {}),
        ("ink", "CMYK", {}),
        ("progressive", "RGB", {"progressive": True}),
        ("fine", "RGB", {"quality": 98, "subsampling": 0}),
        ("restarts", "RGB", {"restart_marker_rows": 1}),
    )
}


@pytest.mark.parametrize("kind", ["text", "international", "profile", "many texts"])
def test_png_with_much_text_is_read_without_it(kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = encode_image(PHOTO, **make_large_texts(kind))
    image = open_rgb(data)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PHOTO))
    assert image.info["readings"] == ("png_text_dropped",)
    assert read_header_frame(data).upright == PHOTO.size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_damaged_text_costs_no_pixel() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "some text that nobody needs")
    data = bytearray(encode_image(PHOTO, pnginfo=info))
    data[data.index(b"nobody")] ^= 1
    image = open_rgb(bytes(data))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PHOTO))
    assert image.info["readings"] == ("png_text_dropped",)


def test_ordinary_texts_are_no_repair() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "short", zip=True)
    assert open_rgb(encode_image(PHOTO, pnginfo=info)).info == {"mode": "RGB", "format": "PNG"}


@pytest.mark.parametrize("zipped", [False, True])
def test_orientation_in_a_text_stays(zipped: bool) -> None:
    """Some tools write the orientation into a text, which must not be lost with the texts that are too large."""
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    info = make_large_texts("international")["pnginfo"]
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=zipped)
    image = open_rgb(encode_image(PHOTO, pnginfo=info))
    assert (image.size, image.info["orientation"]) == ((48, 64), 6)
    np.testing.assert_array_equal(np.asarray(image), np.rot90(np.asarray(PHOTO), -1))


@pytest.mark.parametrize(("size", "count"), [(5_000_000, 1), (900_000, 90)])
def test_large_texts_with_that_name_are_dropped(size: int, count: int) -> None:
    info = PngImagePlugin.PngInfo()
    for _ in range(count):
        info.add_itxt("XML:com.adobe.xmp", "a" * size, zip=True)
    assert open_rgb(encode_image(PHOTO, pnginfo=info)).info["readings"] == ("png_text_dropped",)


def test_damaged_pixels_beside_much_text_are_refused() -> None:
    data = bytearray(encode_image(PHOTO, **make_large_texts("text")))
    data[data.index(b"IDAT") + 2000] ^= 1
    with pytest.raises(BadImage):
        open_rgb(bytes(data))
    with pytest.raises(BadImage):
        open_rgb(encode_image(PHOTO, **make_large_texts("text"))[:-3000])


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("missing", [1, 2])
def test_jpeg_without_its_end_marker_has_every_pixel(name: str, missing: int) -> None:
    image = open_rgb(JPEGS[name][:-missing])
    np.testing.assert_array_equal(np.asarray(image), decode_rgb(JPEGS[name]))
    assert image.info["readings"] == ("jpeg_end_added",)
    assert "readings" not in open_rgb(JPEGS[name]).info


@pytest.mark.parametrize("padding", [b"\0" * 600, b"\xff" * 20, b"\r\n"])
def test_jpeg_without_its_end_marker_may_be_padded(padding: bytes) -> None:
    name = "noise colour"
    np.testing.assert_array_equal(decode_rgb(JPEGS[name][:-2] + padding), decode_rgb(JPEGS[name]))


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_that_is_cut_is_refused_or_has_every_pixel(name: str) -> None:
    """At every length from which something is missing: never pixels that are not those of the file."""
    data, whole = JPEGS[name], decode_rgb(JPEGS[name])
    lengths = [*range(len(data) - 60, len(data) - 2), *range(300, len(data) - 60, 37)]
    read: list[int] = []
    for length in lengths:
        with suppress(BadImage):
            np.testing.assert_array_equal(decode_rgb(data[:length]), whole)
            read.append(length)
    # The last bits of a smooth image may say nothing that is seen.
    assert len(read) <= 5
    assert all(length > len(data) - 8 for length in read)


def test_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    """Cut between two scans, every bit that is there is whole, and the image would be blurred silently."""
    data = JPEGS["noise progressive"]
    scans = [k for k in range(len(data)) if data[k : k + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for cut in scans[1:]:
        # A table for the next scan may stand before it.
        for place in (cut, data.rindex(b"\xff\xc4", 0, cut) if b"\xff\xc4" in data[:cut] else cut):
            with pytest.raises(BadImage):
                open_rgb(data[:place])


def test_apng_and_unknown_chunks_stay() -> None:
    frames = [PHOTO, make_noise(64, 48, 1)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], **make_large_texts("text"))
    image = open_rgb(file.getvalue())
    assert set(image.info["readings"]) == {"png_text_dropped", "first_frame"}
    start = encode_image(PHOTO)
    private = start[:33] + make_png_chunk(b"prVt", b"x" * 100) + start[33:]
    np.testing.assert_array_equal(decode_rgb(private), np.asarray(PHOTO))

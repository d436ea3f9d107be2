"""The format that a file itself has is the one by which it is read; any other bytes give a reason."""

import random
import sys

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.channels.file_format import read_file_format
from firstlight.pipeline.data.channels.pixel_format import FileFormat, PixelFormat
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.images.bad_image import BadImage
from tests.support.channel_images import draw_bands, encode_bands, encode_pages
from tests.support.dicom_files import encode_dicom, read_packaged_dicom
from tests.support.odd_images import encode_image, encode_png_16

WIDE = draw_bands(0)[:20]
GREY = draw_bands(0, 1)[:20, :, 0]
FILES = {
    "bands": (encode_bands(WIDE), 13, 16, 1),
    "planes": (encode_bands(WIDE.transpose(2, 0, 1), planarconfig="separate"), 13, 16, 1),
    "pages": (encode_pages(WIDE), 13, 16, 13),
    "bands of 8 bits": (encode_bands(draw_bands(0, 5, bits=8)[:20]), 5, 8, 1),
    "PNG": (encode_png_16(draw_bands(0, 4)[:20]), 4, 16, 1),
    "grey JPEG": (encode_image(Image.new("L", (32, 20)), "JPEG"), 1, 8, 1),
    "DICOM": (encode_dicom(GREY), 1, 16, 1),
    "signed DICOM": (encode_dicom(GREY.astype(np.int16), Modality="CT"), 1, 16, 1),
    "frames": (encode_dicom(np.zeros((4, 20, 32, 1), np.uint16)), 4, 16, 4),
    "colours": (encode_dicom(draw_bands(0, 3, bits=8)[:20]), 3, 8, 1),
}


@pytest.mark.parametrize("name", FILES)
def test_format_is_the_one_by_which_the_file_is_read(name: str) -> None:
    data, channels, bits, parts = FILES[name]
    found = read_file_format(data)
    assert found == FileFormat(PixelFormat(channels, bits), (32, 20), parts)
    assert found.is_stack == (name in ("pages", "frames"))
    image = open_channels(data, found.pixels)
    assert (image.values.shape[2], image.size) == (channels, found.size)


def test_size_is_that_of_the_upright_image() -> None:
    turned = encode_bands(WIDE, extratags=[(274, 3, 1, 6, True)])
    assert read_file_format(turned).size == open_channels(turned, PixelFormat(13, 16)).size == (20, 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode_bands(WIDE.astype(np.float32)), "has 32 bits a channel, floats; valid: 13 channels of 16 bits"),
        (encode_bands(WIDE.astype(np.int16)), "has 16 bits a channel, signed integers; valid: 13 channels of 16 bits"),
        (encode_bands(WIDE, compression="lzma"), "is compressed by LZMA; valid: none, LZW, deflate, "),
        (encode_bands(np.zeros((4, 4, 600), np.uint8)), "has 600 channels of 8 bits; valid: 512 channels of 8 bits"),
        (encode_dicom(GREY, RescaleSlope=0.37), r"has values that are to be multiplied by 0\.37"),
        (encode_dicom(GREY, HighBit=14), "has samples whose highest bit is 14 of 16"),
        (encode_dicom(GREY, BitsAllocated=32), "has 1 channel of 32 bits; valid: 1 channel of 16 bits"),
        (read_packaged_dicom("rtplan.dcm"), "is DICOM without pixels"),
        (read_packaged_dicom("MR_small_jpeg_ls_lossless.dcm"), "is compressed by JPEG-LS Lossless Image Compression"),
        (encode_image(Image.new("P", (8, 8))), "has a palette, or pixels of another kind than levels of each channel"),
        (encode_image(Image.new("1", (8, 8))), "has 1 channel of 1 bits; valid: 1 channel of 16 bits"),
        (encode_image(Image.new("L", (8, 8)), "GIF"), r"is not a readable image \(PNG, JPEG, WEBP, BMP\)"),
        (b"", r"is empty \(0 bytes\)"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^{reason}"):
        read_file_format(data)


def test_without_pydicom_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BadImage, match=r"^is DICOM, which needs an extra: pip install 'firstlight\[dicom\]'$"):
        read_file_format(encode_dicom(GREY))


@pytest.mark.parametrize("name", ["bands", "pages", "PNG", "DICOM", "frames"])
def test_damaged_files_give_a_format_or_a_reason(name: str) -> None:
    data, chance = FILES[name][0], random.Random(0)
    reasons = list[str]()
    for _ in range(60):
        damaged = bytearray(data)
        # The header is what a reader trips over; that of TIFF pages lies between their pixels.
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(min(len(data), 1_000))] = chance.randrange(256)
        try:
            found = read_file_format(bytes(damaged[: chance.choice([len(data), chance.randrange(len(data))])]))
        except BadImage as error:
            reasons.append(str(error))
        else:
            assert 1 <= found.pixels.channels <= 512
            assert found.pixels.bits in (8, 16)
            assert min(found.size) >= 1
    assert reasons
    assert all("\n" not in reason for reason in reasons)

"""DICOM files: stored values come out as levels by a stated rule, and others are refused by name."""

import random
import sys

import numpy as np
import pytest

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.images import BadImage, open_rgb
from tests.support.channel_images import draw_bands
from tests.support.dicom_files import encode_dicom, read_packaged_dicom

GREY = PixelFormat(1, 16)
VALUES = draw_bands(0, 1)[:, :, 0]
SIGNED = (VALUES.astype(np.int32) - 30_000).astype(np.int16)


def read(data: bytes, wanted: PixelFormat = GREY) -> np.ndarray:
    found = open_channels(data, wanted)
    assert found.values.dtype == wanted.dtype
    return found.values if wanted.channels > 1 else found.values[:, :, 0]


def test_unsigned_values_are_levels_as_they_are() -> None:
    assert np.array_equal(read(encode_dicom(VALUES)), VALUES)
    found = open_channels(encode_dicom(VALUES), GREY)
    assert found.info == {"mode": "1 channel of 16 bits", "format": "DICOM"}
    colours = draw_bands(1, 3, bits=8)
    assert np.array_equal(read(encode_dicom(colours), PixelFormat(3, 8)), colours)


def test_frames_are_channels_in_their_order() -> None:
    bands = draw_bands(2, 5)
    stack = np.ascontiguousarray(bands.transpose(2, 0, 1)[:, :, :, None])
    assert np.array_equal(read(encode_dicom(stack), PixelFormat(5, 16)), bands)


def test_signed_values_keep_their_order() -> None:
    assert np.array_equal(read(encode_dicom(SIGNED)), SIGNED.astype(np.int32) + 32_768)


def test_hounsfield_units_are_the_same_levels_however_they_are_stored() -> None:
    units = draw_bands(3, 1)[:, :, 0].astype(np.int64) // 32 - 1_000
    stored = {
        "unsigned": encode_dicom(
            (units + 1_024).astype(np.uint16), Modality="CT", RescaleSlope=1, RescaleIntercept=-1024
        ),
        "signed": encode_dicom(units.astype(np.int16), Modality="CT", RescaleSlope=1, RescaleIntercept=0),
        "signed and moved": encode_dicom((units + 24).astype(np.int16), Modality="CT", RescaleIntercept=-24),
        "12 of 16 bits": encode_dicom(
            (units + 1_024).astype(np.uint16), Modality="CT", RescaleIntercept=-1024, BitsStored=12, HighBit=11
        ),
        "unsigned, without an intercept": encode_dicom(units.clip(0).astype(np.uint16), Modality="CT"),
    }
    for name, data in stored.items():
        expected = units.clip(0) if name == "unsigned, without an intercept" else units
        assert np.array_equal(read(data), expected + 32_768), name


def test_bits_that_are_not_used_are_left_out() -> None:
    values = VALUES & 4095
    drawn = values | 0xA000
    assert np.array_equal(read(encode_dicom(drawn, BitsStored=12, HighBit=11)), values)
    signed = (values.astype(np.int32) - 2_048).astype(np.int16)
    without_sign = (signed.view(np.uint16) & 0x0FFF).view(np.int16)
    found = read(encode_dicom(without_sign, BitsStored=12, HighBit=11))
    assert np.array_equal(found, signed.astype(np.int32) + 32_768)


def test_min_is_white_is_inverted_within_its_bits() -> None:
    values = VALUES & 4095
    options = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    assert np.array_equal(read(encode_dicom(values, **options)), 4_095 - values)
    assert np.array_equal(
        read(encode_dicom(SIGNED, PhotometricInterpretation="MONOCHROME1")), 32_767 - SIGNED.astype(int)
    )


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm"]
)
def test_every_encoding_of_a_scan_gives_the_same_levels(name: str) -> None:
    assert np.array_equal(read(read_packaged_dicom(name)), read(read_packaged_dicom("MR_small.dcm")))


def test_a_tomography_whose_file_begins_as_a_tiff_file_has_hounsfield_units() -> None:
    data = read_packaged_dicom("CT_small.dcm")
    assert data.startswith(b"II*\0")
    levels = read(data)
    # The lowest are of air, and its intercept is -1,024.
    assert (levels.shape, int(levels.min()) - 32_768, int(levels.max()) - 32_768) == ((128, 128), -896, 1_167)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode_dicom(draw_bands(0, 3, bits=8)), r"has 3 channels of 8 bits; valid: 1 channel of 16 bits"),
        (encode_dicom(np.zeros((2, 8, 8, 1), np.uint16)), r"has 2 channels of 16 bits in 2 frames, whose"),
        (encode_dicom(np.zeros((300, 300), np.uint16)), r"has 300 x 300 pixels; valid: at most 10000 pixels"),
        (encode_dicom(VALUES, RescaleSlope=0.37, RescaleIntercept=2), r"has values that are to be multiplied by 0\.37"),
        (encode_dicom(VALUES, RescaleIntercept=-40_000), r"has levels of .* to .*; valid: 0 to 65,535"),
        (encode_dicom(VALUES, HighBit=14), r"has samples whose highest bit is 14 of 16"),
        (encode_dicom(VALUES)[:-50], r"The number of bytes of pixel data is less than expected"),
        (b"\0" * 128 + b"DICM" + b"\0" * 100, r".+"),
        (read_packaged_dicom("image_dfl.dcm"), r"is DICOM that is deflated as a whole, which is not read"),
        (read_packaged_dicom("examples_palette.dcm"), r"has \d+ x \d+ pixels|has colours of the kind PALETTE COLOR"),
        (read_packaged_dicom("MR_small_jpeg_ls_lossless.dcm"), r"is compressed by JPEG-LS Lossless Image Compression"),
        (read_packaged_dicom("rtplan.dcm"), r"is DICOM without pixels"),
        (read_packaged_dicom("nested_priv_SQ.dcm"), r"is DICOM without Rows, Columns, SamplesPerPixel"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^({reason})"):
        open_channels(data, GREY, 10_000)


def test_without_stated_channels_the_reason_names_the_keys() -> None:
    with pytest.raises(BadImage, match=r"^is DICOM; valid: dataset\.channels=1 dataset\.bits=16"):
        open_rgb(read_packaged_dicom("CT_small.dcm"))


def test_without_pydicom_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BadImage, match=r"^is DICOM, which needs an extra: pip install 'firstlight\[dicom\]'$") as found:
        read(encode_dicom(VALUES))
    assert found.value.kind == "needs an extra"


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm"])
def test_damaged_files_give_an_image_or_a_reason(name: str) -> None:
    data, chance = read_packaged_dicom(name), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        # Most of a file are pixels: the header is what a reader trips over.
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(132, 1_500)] = chance.randrange(256)
        try:
            open_channels(bytes(damaged[: chance.choice([len(data), chance.randrange(len(data))])]), GREY, 100_000)
        except BadImage:
            refused += 1
    assert 0 < refused <= 60

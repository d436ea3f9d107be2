"""Maps of classes: what is certain is read and told, what is not names the key that settles it."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import BadImage, decode_class_map
from firstlight.pipeline.data.images.class_maps import (
    VOID_VALUE,
    ClassMapRule,
    advise_mask_values,
    encode_class_map,
    interpret_class_map,
    list_voc_colours,
)
from tests.support.odd_images import encode_image, make_exif
from tests.support.png_maps import png

CLASSES = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
VOC = np.array([*list_voc_colours(255), (224, 224, 192)], np.uint8)
RULE = ClassMapRule(3)


def make_palette(colours: np.ndarray, values: np.ndarray = CLASSES) -> Image.Image:
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


def read_map(data: bytes, rule: ClassMapRule = RULE) -> tuple[list[list[int]], tuple[str, ...]]:
    mask, readings = interpret_class_map(data, 1000, rule)
    return decode_class_map(mask).tolist(), readings


def refuse_map(data: bytes, rule: ClassMapRule = RULE) -> str:
    with pytest.raises(BadImage) as raised:
        interpret_class_map(data, 1000, rule)
    return str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        encode_image(CLASSES),
        png(CLASSES),
        encode_image(make_palette(VOC)),
        encode_image(np.where(CLASSES == 2, 255, CLASSES).astype(np.uint8)),
        encode_image(make_palette(np.repeat(np.arange(256)[:, None], 3, 1))),
    ],
)
def test_ordinary_masks_stay_as_they_are(data: bytes) -> None:
    assert interpret_class_map(data, 1000, RULE) == (data, ())


TWO_BITS = io.BytesIO()
make_palette(VOC[:4]).save(TWO_BITS, "PNG", bits=2)


def encode_grey_bits(bits: int) -> bytes:
    """A grey PNG of fewer than 8 bits, made of one whose palette has as many."""
    file = io.BytesIO()
    make_palette(VOC[: 2**bits], CLASSES % 2**bits).save(file, "PNG", bits=bits)
    data = file.getvalue()
    import struct
    import zlib

    header = bytearray(data[16:29])
    header[9] = 0
    start = data[:16] + bytes(header) + struct.pack(">I", zlib.crc32(b"IHDR" + bytes(header)))
    palette = data.index(b"PLTE") - 4
    length = 12 + int.from_bytes(data[palette : palette + 4], "big")
    return start + data[33:palette] + data[palette + length :]


@pytest.mark.parametrize(
    ("data", "expected", "reading"),
    [
        (encode_image(Image.fromarray(CLASSES > 0)), CLASSES > 0, "mask_few_bits"),
        (encode_grey_bits(1), CLASSES % 2, "mask_few_bits"),
        (encode_grey_bits(2), CLASSES, "mask_few_bits"),
        (encode_grey_bits(4), CLASSES, "mask_few_bits"),
        (encode_image(CLASSES.astype(np.uint16)), CLASSES, "mask_16_bits"),
        (encode_image(CLASSES.astype(np.int32), "TIFF"), CLASSES, "mask_16_bits"),
        (encode_image(np.repeat(CLASSES[:, :, None], 3, 2)), CLASSES, "mask_grey_as_colours"),
        (encode_image(np.dstack([CLASSES, np.full_like(CLASSES, 255)])), CLASSES, "mask_grey_as_colours"),
        (encode_image(VOC[CLASSES]), CLASSES, "mask_voc_colours"),
        (
            encode_image(VOC[np.where(CLASSES == 1, 255, CLASSES)]),
            np.where(CLASSES == 1, 255, CLASSES),
            "mask_voc_colours",
        ),
        (encode_image(np.dstack([VOC[CLASSES], np.full_like(CLASSES, 255)])), CLASSES, "mask_voc_colours"),
        (encode_image(CLASSES, "TIFF"), CLASSES, "mask_tiff"),
        (encode_image(CLASSES, "BMP"), CLASSES, "mask_bmp"),
        (encode_image(VOC[CLASSES], "BMP"), CLASSES, "mask_voc_colours"),
    ],
)
def test_certain_masks_are_read_and_reported(data: bytes, expected: np.ndarray, reading: str) -> None:
    values, readings = read_map(data)
    assert values == expected.astype(int).tolist()
    assert reading in readings


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_mask_with_an_orientation_of_its_own_is_turned(orientation: int, kind: str) -> None:
    values, readings = read_map(encode_image(CLASSES, kind, exif=make_exif(orientation)))
    assert values == np.rot90(CLASSES, -1 if orientation == 6 else 2).tolist()
    assert "mask_turned" in readings


BINARY = (CLASSES > 0).astype(np.uint8) * 255
STATED: list[tuple[bytes, ClassMapRule, Any]] = [
    (encode_image(BINARY), ClassMapRule(2, {0: 0, 255: 1}), CLASSES > 0),
    (encode_image(BINARY), ClassMapRule(2, {0: VOID_VALUE, 255: 1}), np.where(CLASSES > 0, 1, 255)),
    (encode_image(make_palette(VOC)), ClassMapRule(2, {0: 1, 1: 0, 2: 0}), CLASSES == 0),
    (encode_image(np.repeat(BINARY[:, :, None], 3, 2)), ClassMapRule(2, {0: 0, 255: 1}), CLASSES > 0),
    (encode_image(CLASSES.astype(np.uint16) * 1000), ClassMapRule(3, {0: 0, 1000: 1, 2000: 2}), CLASSES),
    (
        encode_image(make_palette(VOC[::-1])),
        ClassMapRule(3, {}, {tuple(map(int, VOC[255 - k])): k for k in range(3)}),
        CLASSES,
    ),
    (
        encode_image(VOC[CLASSES + 50]),
        ClassMapRule(3, {}, {tuple(map(int, VOC[k + 50])): k for k in range(3)}),
        CLASSES,
    ),
    (encode_image(BINARY), ClassMapRule(2, {}, {(0, 0, 0): 1, (255, 255, 255): 0}), CLASSES == 0),
]


@pytest.mark.parametrize(("data", "rule", "expected"), STATED, ids=range(len(STATED)))
def test_stated_values_count(data: bytes, rule: ClassMapRule, expected: np.ndarray) -> None:
    values, readings = read_map(data, rule)
    assert values == expected.astype(int).tolist()
    assert readings[-1] == "mask_values_stated"


@pytest.mark.parametrize(
    ("data", "rule", "seen"),
    [
        (encode_image(VOC[CLASSES + 50]), RULE, "no class is known for the colours"),
        (
            encode_image(VOC[CLASSES + 1]),
            ClassMapRule(2),
            '#008000, #808000; valid: dataset.mask_values={name: "#008000", ...}',
        ),
        (encode_image(CLASSES.astype(np.uint16) * 1000), RULE, "the value 1000 is not a class"),
        (encode_image(np.dstack([VOC[CLASSES], CLASSES])), RULE, "is partly transparent"),
        (encode_image(CLASSES), ClassMapRule(2, {0: 0, 255: 1}), "does not name the value 1"),
        (encode_image(VOC[CLASSES]), ClassMapRule(2, {0: 0, 255: 1}), "mask_values does not name the colours #000000"),
        (encode_image(CLASSES.astype(np.uint16)), ClassMapRule(2, {}, {(0, 0, 0): 0}), "mode I;16"),
        (encode_image(VOC[CLASSES]), ClassMapRule(2, {}, {(0, 0, 0): 0, (1, 1, 1): 1}), "does not name the colours"),
        (encode_image(make_palette(VOC[[0, 2, 1]])), RULE, "entry 1 has the colour of class 2"),
        (encode_image(VOC[CLASSES], "JPEG"), RULE, "is a JPEG file"),
        (encode_image(CLASSES.astype(np.float32), "TIFF"), RULE, "mode F"),
        (b"", RULE, "is empty"),
    ],
)
def test_uncertain_masks_name_what_was_seen(data: bytes, rule: ClassMapRule, seen: str) -> None:
    message = refuse_map(data, rule)
    assert seen in message
    assert "valid: " in message or data == b""
    assert "\n" not in message


def test_palette_of_other_colours_counts_by_its_entries() -> None:
    """Two entries that look like black and grey are no sign of VOC's colours in another order."""
    greyish = np.array([(0, 0, 0), (128, 128, 128), (255, 255, 255)])
    assert interpret_class_map(encode_image(make_palette(greyish)), 1000, ClassMapRule(21))[1] == ()


def test_colours_are_those_of_voc() -> None:
    """The first of the table in the devkit of PASCAL VOC."""
    assert list_voc_colours(9)[:5] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert list_voc_colours(9)[8] == (64, 0, 0)
    assert len(set(list_voc_colours(256))) == 256


def test_stored_maps_are_strict() -> None:
    data = encode_class_map(CLASSES)
    np.testing.assert_array_equal(decode_class_map(data), CLASSES)
    for wrong in (encode_image(VOC[CLASSES]), encode_grey_bits(2), encode_image(CLASSES.astype(np.uint16))):
        with pytest.raises(BadImage, match="is not a map of classes"):
            decode_class_map(wrong)
    with pytest.raises(BadImage, match="5 pixels"):
        decode_class_map(data, 5)
    assert advise_mask_values(7).startswith("valid: dataset.mask_values={name: 7, ...}, the values of each class")

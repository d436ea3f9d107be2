"""The size of a JPEG XL file, as its first bits state it."""

import struct

import pytest

from firstlight.pipeline.data.images.formats import JXL_CODESTREAM, JXL_CONTAINER
from firstlight.pipeline.data.images.jpeg_xl import read_jxl_size


def pack_bits(*fields: tuple[int, int]) -> bytes:
    """Packs (value, number of bits), the first into the lowest bits."""
    number = place = 0
    for value, count in fields:
        number |= value << place
        place += count
    return JXL_CODESTREAM + number.to_bytes(14, "little")


# 60 x 40 as libjxl writes it: both sides are no multiples of 8 up to 256, or one is.
CODESTREAMS = [
    (pack_bits((1, 1), (4, 5), (0, 3), (7, 5)), (64, 40)),
    (pack_bits((1, 1), (7, 5), (1, 3)), (64, 64)),
    (pack_bits((0, 1), (0, 2), (39, 9), (0, 3), (0, 2), (59, 9)), (60, 40)),
    (pack_bits((0, 1), (2, 2), (99_999, 18), (0, 3), (3, 2), (999_999_999, 30)), (1_000_000_000, 100_000)),
    (pack_bits((0, 1), (1, 2), (1079, 13), (5, 3)), (1920, 1080)),
]


@pytest.mark.parametrize(("data", "size"), CODESTREAMS)
def test_size_is_read_in_both_layouts(data: bytes, size: tuple[int, int]) -> None:
    boxed = JXL_CONTAINER + struct.pack(">I", 20) + b"ftypjxl " + bytes(8)
    assert read_jxl_size(data) == size
    assert read_jxl_size(boxed + struct.pack(">I", 8 + len(data)) + b"jxlc" + data) == size
    assert read_jxl_size(boxed + struct.pack(">I", 12 + len(data)) + b"jxlp" + bytes(4) + data) == size
    large = struct.pack(">I", 1) + b"jxlc" + struct.pack(">Q", 16 + len(data)) + data
    assert read_jxl_size(boxed + large) == size


@pytest.mark.parametrize("data", [b"", JXL_CONTAINER, JXL_CONTAINER + bytes(40), JXL_CONTAINER + b"\0\0\0\4jxlb"])
def test_file_without_codestream_has_no_size(data: bytes) -> None:
    assert read_jxl_size(data) is None

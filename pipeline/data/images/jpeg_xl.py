"""The size that a JPEG XL file declares, read before its library, which decodes all pixels as soon as it opens a file.

ISO/IEC 18181-1, section 9.2.1 (SizeHeader), and 18181-2 for the boxes around it.
"""

from firstlight.pipeline.data.images.formats import JXL_CODESTREAM

# Bits of a side that is no multiple of 8, by its selector.
SIDE_BITS = (9, 13, 18, 30)
# Width : height by number; 0 states the width itself.
ASPECT_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
# The most bytes that a size takes, with the signature of a codestream.
SIZE_BYTES = 16


class _BitReader:
    """Reads numbers from the lowest bit of the first byte on; what is beyond the end is 0."""

    def __init__(self, data: bytes) -> None:
        self.rest = int.from_bytes(data, "little")

    def read_bits(self, count: int) -> int:
        value = self.rest & ((1 << count) - 1)
        self.rest >>= count
        return value


def read_jxl_size(data: bytes) -> tuple[int, int] | None:
    """Returns the declared width and height of a JPEG XL file; None if it has no codestream."""
    start = _find_codestream(data)
    if start is None or data[start : start + 2] != JXL_CODESTREAM:
        return None
    bits = _BitReader(data[start + 2 : start + SIZE_BYTES])
    is_small = bool(bits.read_bits(1))
    height = _read_side(bits, is_small)
    ratio = bits.read_bits(3)
    if ratio == 0:
        return _read_side(bits, is_small), height
    across, down = ASPECT_RATIOS[ratio - 1]
    return height * across // down, height


def _read_side(bits: _BitReader, is_small: bool) -> int:
    if is_small:
        return 8 * (bits.read_bits(5) + 1)
    return bits.read_bits(SIDE_BITS[bits.read_bits(2)]) + 1


def _find_codestream(data: bytes) -> int | None:
    """Returns where the codestream begins: the file itself, a box `jxlc`, or the first box `jxlp` after its number."""
    if data.startswith(JXL_CODESTREAM):
        return 0
    place = 0
    while place + 8 <= len(data):
        size, name, head = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if name in (b"jxlc", b"jxlp"):
            return place + head + (4 if name == b"jxlp" else 0)
        if size < head:
            return None
        place += size
    return None

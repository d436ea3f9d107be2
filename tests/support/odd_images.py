"""Image files that people have and Pillow does not write: 16 bits a sample in colour, texts of megabytes, EXIF."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def encode_image(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def make_noise(width: int = 17, height: int = 24, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def make_png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def encode_png_16(samples: np.ndarray) -> bytes:
    """(H, W, C) uint16 -> a PNG of 16 bits a sample: grey, grey and alpha, colours, colours and alpha."""
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR_TYPES[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_png_chunk(*chunk) for chunk in chunks)


def encode_tiff_16(samples: np.ndarray, order: str = "<", *, deflate: bool = False, planes: bool = False) -> bytes:
    """(H, W, 3) uint16 -> a TIFF of 16 bits a sample, in either byte order, with a plane for each colour if asked."""
    height, width, channels = samples.shape
    data = (samples.transpose(2, 0, 1) if planes else samples).astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflate else data
    place, plane = 8 + len(data), width * height * 2
    strips = [8 + k * plane for k in range(channels)] if planes else [8]
    lengths = [plane] * channels if planes else [len(data)]
    lists = {258: ("H", [16] * channels), 273: ("I", strips), 279: ("I", lengths)}
    values = {256: width, 257: height, 259: 8 if deflate else 1, 262: 2, 277: channels, 278: height, 284: 1 + planes}
    tail, entries = b"", {}
    for tag, (kind, numbers) in lists.items():
        code = {"H": 3, "I": 4}[kind]
        if len(numbers) == 1:
            entries[tag] = (code, 1, numbers[0])
        else:
            entries[tag] = (code, len(numbers), place + len(tail))
            tail += struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
    entries |= {tag: (4, 1, value) for tag, value in values.items()}
    packed = b"".join(struct.pack(f"{order}HHII", tag, *entries[tag]) for tag in sorted(entries))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", place + len(tail))
    return start + data + tail + struct.pack(f"{order}H", len(entries)) + packed + struct.pack(f"{order}I", 0)


def make_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_large_texts(kind: str) -> dict[str, Any]:
    """Options of Pillow for a PNG with more text than Pillow reads."""
    if kind == "profile":
        return {"icc_profile": b"a" * 5_000_000}
    info = PngImagePlugin.PngInfo()
    if kind == "text":
        info.add_text("comment", "a" * 5_000_000, zip=True)
    elif kind == "international":
        info.add_itxt("comment", "a" * 5_000_000, zip=True)
    else:
        for k in range(80):
            info.add_text(f"comment {k}", "a" * 1_000_000, zip=True)
    return {"pnginfo": info}

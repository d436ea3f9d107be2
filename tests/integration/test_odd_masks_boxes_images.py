"""Masks, boxes and image files as people have them: read and told, or refused with what was seen and the key.

Each row is an input, the numbers of training images that the store has and lacks (None if it is refused), and texts
that are among the lines of the terminal, the report and the manifest.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.odd_images import encode_image, encode_png_16, make_exif, make_noise, make_png_chunk
from tests.support.odd_sources import (
    WriteCase,
    boxes_case,
    encode_pages,
    make_halves,
    masks_case,
    read_case,
    write_images,
    write_object,
)

HALVES = make_halves()
OWN_COLOURS = np.array([(0, 0, 0), (10, 20, 30)], np.uint8)[HALVES]
ANT, BEE = write_object("ant", 2, 2, 9, 9), write_object("bee", 1, 1, 5, 5)
Row = tuple[WriteCase, tuple[int, int] | None, tuple[str, ...]]
MASKS: dict[str, Row] = {
    "VOC's colours": (
        masks_case(lambda k: np.array([(0, 0, 0), (128, 0, 0)], np.uint8)[HALVES]),
        (4, 0),
        ("masks of VOC's colours, taken as the classes that they stand for: 6", "annotations mask, of 2 classes"),
    ),
    "own colours": (
        masks_case(lambda k: OWN_COLOURS),
        None,
        ("no class is known for the colours #0a141e", 'dataset.mask_values={name: "#0a141e", ...}'),
    ),
    "own colours that are stated": (
        masks_case(lambda k: OWN_COLOURS, mask_values={"ground": "#000000", "cell": "#0a141e"}),
        (4, 0),
        ("masks read by dataset.mask_values: 6",),
    ),
    "from 1 on": (
        masks_case(lambda k: HALVES + 1),
        None,
        ("the value 2 is not a class; valid: 0 to 1, and 255 (void), or dataset.mask_values={name: 2, ...}",),
    ),
    "from 1 on that are stated": (
        masks_case(lambda k: HALVES + 1, mask_values={"ground": 1, "cell": 2}),
        (4, 0),
        ("masks read by dataset.mask_values: 6",),
    ),
    "16 bits": (
        masks_case(lambda k: HALVES.astype(np.uint16)),
        (4, 0),
        ("masks of 16 or 32 bits, whose values are taken as classes: 6",),
    ),
    "0 and 255 of which few are 255": (
        masks_case(lambda k: np.where(np.arange(24) < 1, 255, np.zeros((18, 24))).astype(np.uint8)),
        None,
        (
            "4.2% of the pixels of the training masks are 255, which is void",
            "valid, if 255 is a class: {ground: 0, cell: 255}",
        ),
    ),
    "255 as the third class": (
        masks_case(lambda k: np.where(np.arange(24) < 8, 255, HALVES).astype(np.uint8), "ground\ncell\ncore\n"),
        None,
        ("class 2 ('core') never occurs; valid, if 255 is a class: {ground: 0, cell: 1, core: 255}",),
    ),
    "smoothed edges": (
        masks_case(lambda k: np.where(np.arange(24) == 11, 100, HALVES * 255).astype(np.uint8)),
        None,
        ("the value 100 is not a class",),
    ),
    "transparency": (
        masks_case(lambda k: Image.fromarray(np.dstack([OWN_COLOURS, HALVES * 255]))),
        None,
        ("is partly transparent; valid: a mask without transparency",),
    ),
    "another size": (
        masks_case(lambda k: HALVES[: 9 if k == 0 else 18]),
        (3, 1),
        ("1 image cannot be decoded (1 annotation)",),
    ),
    "no names of classes": (
        masks_case(lambda k: HALVES, None),
        (4, 0),
        ("the masks in SegmentationClass are not read, as nothing names their classes; valid: classes.txt",),
    ),
}
BOXES: dict[str, Row] = {
    "fractions": (
        boxes_case(write_object("ant", 0.1, 0.1, 0.5, 0.6)),
        None,
        ("has boxes in fractions of the image, e.g. 0.1; valid: pixels, as in <xmin>48</xmin>",),
    ),
    "one pixel": (
        boxes_case(write_object("ant", 1, 1, 1, 1) + ANT),
        (4, 0),
        ("annotations boxes, present, of 1 class",),
    ),
    "swapped": (
        boxes_case(write_object("ant", 9, 9, 2, 2)),
        (4, 0),
        ("boxes whose ends were swapped, read in order: 6",),
    ),
    "outside": (
        boxes_case(ANT + write_object("ant", 100, 100, 200, 200)),
        (4, 0),
        ("boxes without a pixel of their image, left out: 6",),
    ),
    "no numbers": (
        boxes_case(ANT + write_object("ant", "nan", 2, 9, 9)),
        (4, 0),
        ("objects without a box of four numbers; their classes count as present, without a box: 6",),
    ),
    "rotated": (
        boxes_case(ANT + "<object><name>ant</name><robndbox><cx>5</cx></robndbox></object>"),
        (4, 0),
        ("objects without a box of four numbers; their classes count as present, without a box: 6",),
    ),
    "names that differ in case": (
        boxes_case(ANT, write_object("Ant", 1, 1, 5, 5)),
        (4, 0),
        ("classes that look alike are kept apart: 'Ant' and 'ant'", "of 2 classes: Ant, ant"),
    ),
    "another size is stated": (
        boxes_case(f"<size><width>240</width><height>180</height></size>{ANT}"),
        (4, 0),
        ("annotations that state another size than their image has, taken in pixels of the image",),
    ),
    "boxes of another size": (
        boxes_case(f"<size><width>240</width><height>180</height></size>{write_object('ant', 20, 20, 90, 90)}"),
        None,
        ("states 240 x 180 pixels, and its image has 24 x 18: object 1 reaches over its edge",),
    ),
    "damaged file": (
        boxes_case(ANT, BEE, "<object"),
        (3, 2),
        ("2 images cannot be decoded (2 not read)", "splits of ImageSets/Main: training = train; test = test"),
    ),
}


def files_case(files: dict[str, bytes], **fields: Any) -> WriteCase:
    """A folder of two classes with ordinary images; `files` are put to the second one."""

    def write(root: Path) -> dict[str, Any]:
        write_images(root, "ant", "bee")
        for name, data in files.items():
            (root / "bee" / name).write_bytes(data)
        return {"root": root, "test_fraction": 0.0, **fields}

    return write


def encode_huge_png() -> bytes:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"x")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_png_chunk(*chunk) for chunk in chunks)


def encode_transparent_palette() -> bytes:
    file = io.BytesIO()
    make_noise(8, 8, 3).convert("P").save(file, "PNG", transparency=3)
    return file.getvalue()


NOISE = make_noise(8, 8, 50)
FILES: dict[str, Row] = {
    "modes": (
        files_case(
            {
                "cmyk.jpg": encode_image(NOISE.convert("CMYK"), "JPEG"),
                "grey.png": encode_image(NOISE.convert("LA")),
                "palette.png": encode_transparent_palette(),
                "bits.png": encode_image(NOISE.convert("1")),
                "lab.tif": encode_image(NOISE.convert("LAB"), "TIFF"),
            }
        ),
        (17, 0),
        ("read 17 files",),
    ),
    "transparent everywhere": (
        files_case({"a.png": encode_image(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))}),
        (13, 0),
        ("images of one colour: 1",),
    ),
    "animations and pages": (
        files_case({"a.gif": encode_pages("GIF"), "b.webp": encode_pages("WEBP"), "c.tif": encode_pages("TIFF")}),
        (15, 0),
        ("files of several images (animations, pages), of which the first is read: 3",),
    ),
    "broken": (
        files_case(
            {
                "empty.jpg": b"",
                "half.png": encode_image(NOISE)[:60],
                "page.jpg": b"<html>404</html>",
                "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\n",
                "film.jpg": b"\0\0\0\x18ftypmp42" + bytes(200),
                "huge.png": encode_huge_png(),
                "png.jpg": encode_image(NOISE),
            }
        ),
        (13, 6),
        ("6 images cannot be decoded (4 unreadable, 1 too large, 1 truncated)",),
    ),
    "orientations": (
        files_case({f"{k}.jpg": encode_image(make_noise(8, 6, k), "JPEG", exif=make_exif(k)) for k in range(1, 10)}),
        (21, 0),
        ("images turned upright by their EXIF orientation: 7",),
    ),
    "10 bits of 16": (
        files_case({f"deep{k}.png": encode_png_16(np.full((8, 8, 3), 500 + k, np.uint16)) for k in range(3)}),
        (15, 0),
        ("3 images of 16-bit colour have levels 500 to 502: 0 is black, 511 is white", "3 of them have one colour"),
    ),
    "beyond the stated bits": (
        files_case({"a.png": encode_image(np.full((8, 8), 300, np.uint16))}, depth=8),
        (12, 1),
        ("1 image cannot be decoded (1 levels)",),
    ),
    "nearly black": (
        files_case({"a.png": encode_image(np.eye(8, dtype=np.uint8))}),
        (13, 0),
        ("images without a level above 31 of 255: 1",),
    ),
    "films and raw files": (
        files_case({name: b"II*\0" + bytes(60) for name in ("a.mp4", "b.cr2", "c.dng", "d.psd", "e.svg")}),
        (12, 0),
        ("read 12 files, left out 5: .cr2 1, .dng 1, .mp4 1, .psd 1, .svg 1",),
    ),
}
CASES = {**MASKS, **BOXES, **FILES}


@pytest.mark.parametrize("name", CASES)
def test_files_are_read_and_reported_or_refused(tmp_path: Path, name: str) -> None:
    write, expected, told = CASES[name]
    store, lines = read_case(tmp_path, write)
    for text in told:
        assert any(text in line for line in lines), lines
    assert (store is None) == (expected is None)
    if store is not None and expected is not None:
        assert (store.splits["train"], store.quarantined) == expected
        assert store.source["reading"] == lines[: len(store.source["reading"])]
    else:
        assert "\n" not in lines[0]

"""Annotations are checked against their image, and survive Parquet unchanged."""

import io
import struct
import zlib
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from firstlight.pipeline.data.annotations import (
    ANNOTATION_COLUMNS,
    Annotation,
    Target,
    count_annotations,
    find_present_classes,
    fit_to_image,
    pack_columns,
    select_annotation_columns,
    unpack_columns,
)
from firstlight.pipeline.data.images import BadImage
from firstlight.tasks.downstream.task import TargetKind
from tests.support.odd_images import make_png_chunk
from tests.support.png_maps import png


def boxes(*sides: tuple[float, float, float, float], difficult: tuple[int, ...] = ()) -> Annotation:
    hard = np.isin(np.arange(len(sides)), difficult)
    return Annotation(
        boxes=np.array(sides, np.float32).reshape(-1, 4), box_classes=np.arange(len(sides)) % 3, difficult=hard
    )


def test_present_classes_follow_from_boxes() -> None:
    assert find_present_classes(np.array([0, 2, 2, 3]), np.array([True, True, False, True]), 5).tolist() == [
        -1,
        0,
        1,
        -1,
        0,
    ]
    assert find_present_classes(np.empty(0, np.int64), np.empty(0, bool), 2).tolist() == [0, 0]


def test_boxes_are_cut_at_image_edges() -> None:
    found = fit_to_image(boxes((-3, 2, 5, 40), (0, 0, 20, 10), (19.5, 9, 21, 11)), (20, 10), 3, "a.xml")
    assert found.boxes is not None
    assert found.boxes.tolist() == [[0, 2, 5, 10], [0, 0, 20, 10], [19.5, 9, 20, 10]]
    assert found.boxes.dtype == np.float32

    # A box that reaches over the edge by one pixel at most, as in sets that count from 0, is not counted.
    assert found.readings == {"box_cut": 1}
    assert not fit_to_image(boxes((-1, -1, 21, 11)), (20, 10), 3, "a.xml").readings


@pytest.mark.parametrize("box", [(20, 0, 30, 5), (-5, 0, 0, 5), (3, 4, 3, 8), (5, 2, 4, 8), (0, 10, 5, 12)])
def test_box_without_pixel_is_left_out_and_counted(box: tuple[int, int, int, int]) -> None:
    found = fit_to_image(boxes((0, 0, 1, 1), box, (2, 2, 5, 5), difficult=(2,)), (20, 10), 3, "a.xml")
    assert found.boxes is not None
    assert found.box_classes is not None
    assert found.difficult is not None
    assert found.boxes.tolist() == [[0, 0, 1, 1], [2, 2, 5, 5]]
    assert (found.box_classes.tolist(), found.difficult.tolist()) == ([0, 2], [False, True])
    assert found.readings == {"box_outside": 1}


def test_mask_that_is_void_everywhere_is_counted() -> None:
    void = np.full((6, 4), 255, np.uint8)
    assert fit_to_image(Annotation(mask=png(void)), (4, 6), 3, "m.png").readings == {"mask_void": 1}
    void[5, 3] = 0
    assert not fit_to_image(Annotation(mask=png(void)), (4, 6), 3, "m.png").readings


def values(height: int = 6, width: int = 4) -> np.ndarray:
    """0, 1, 2 and void."""
    return np.array([0, 1, 2, 255], np.uint8)[np.arange(height * width).reshape(height, width) % 4]


@pytest.mark.parametrize(
    "file", [png(values()), png(values(), "L"), png(values() % 4, bits=2), png(values(), optimize=1)]
)
def test_valid_masks_are_accepted(file: bytes) -> None:
    found = fit_to_image(Annotation(mask=file), (4, 6), 4, "m.png")
    assert found.mask is file
    last = 255 if file[24:25] == b"\x08" else 3
    assert count_annotations(found, (4, 6)) == {
        ("pixels", 0): 6,
        ("pixels", 1): 6,
        ("pixels", 2): 6,
        ("pixels", last): 6,
    }


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def grey_of_4_bits() -> bytes:
    """4 x 6, all 1: Pillow makes 17 of it."""
    header = make_png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 6, 4, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + make_png_chunk(b"IDAT", zlib.compress(b"\0\x11\x11" * 6))
        + make_png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (png(values(4, 6)), "has 6 x 4 pixels, its image 4 x 6"),
        (png(values(60, 40)), "has 40 x 60 pixels, its image 4 x 6"),
        (png(np.full((6, 4), 3, np.uint8)), "the value 3 is not a class; valid: 0 to 2, and 255 (void)"),
        (png(np.full((6, 4), 254, np.uint8), "L"), "the value 254 is not a class"),
        (
            saved(Image.new("RGB", (4, 6))),
            "is not a map of classes but an image of mode RGB, 8 bits; valid: a palette, or grey of 8 bits",
        ),
        (saved(Image.new("LA", (4, 6))), "mode LA"),
        (saved(Image.new("I;16", (4, 6))), "mode I;16, 16 bits"),
        (saved(Image.new("1", (4, 6))), "mode 1, 1 bits"),
        (grey_of_4_bits(), "mode L, 4 bits"),
        (saved(Image.new("L", (4, 6)), "JPEG"), "is not a readable image (PNG)"),
        (png(values())[:60], ""),
        (b"", "is empty (0 bytes)"),
        (b"no image", "is not a readable image (PNG)"),
    ],
)
def test_invalid_masks_are_refused(file: bytes, why: str) -> None:
    with pytest.raises(BadImage) as error:
        fit_to_image(Annotation(mask=file), (4, 6), 3, "SegmentationClass/m.png")
    assert str(error.value).startswith("SegmentationClass/m.png: ")
    assert why in str(error.value)
    assert error.value.kind == "annotation"
    assert ("dataset.mask_values" in str(error.value)) == ("is not a class" in why)


@st.composite
def annotations(draw: st.DrawFn, classes: int) -> Annotation:
    count = draw(st.integers(0, 5))
    sides = draw(st.lists(st.tuples(*[st.floats(0, 5000, width=32)] * 4), min_size=count, max_size=count))
    kinds = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    present = draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=classes, max_size=classes))
    hard = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    found = np.array(sides, np.float32).reshape(-1, 4), np.array(kinds, np.int64), np.array(hard, bool)
    return Annotation(np.array(present, np.int8), *found, draw(st.binary(max_size=20)))


@given(
    st.data(),
    st.integers(1, 4),
    st.sampled_from([("boxes", "mask", "present"), ("boxes", "present"), ("mask",), ("present",), ("boxes",)]),
)
def test_packed_annotations_are_unpacked_equal(data: st.DataObject, classes: int, columns: tuple[str, ...]) -> None:
    before = data.draw(st.lists(annotations(classes), min_size=1, max_size=4))
    rows = [pack_columns(found, columns) for found in before]
    table = pa.table(
        {name: pa.array([row[k] for row in rows], ANNOTATION_COLUMNS[name]) for k, name in enumerate(columns)}
    )
    assert select_annotation_columns(["id", *columns]) == columns
    for old, new in zip(before, unpack_columns(table, classes), strict=True):
        expected = {"mask": "mask" in columns, "present": "present" in columns}
        for name in ("present", "boxes", "box_classes", "difficult"):
            was, now = getattr(old, name), getattr(new, name)
            if expected.get(name, "boxes" in columns):
                np.testing.assert_array_equal(was, now)
                assert (was.dtype, was.shape) == (now.dtype, now.shape)
            else:
                assert now is None
        assert new.mask == (old.mask if expected["mask"] else None)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"present": pa.array([[1, 0], [1]], ANNOTATION_COLUMNS["present"])}),
        pa.table({"present": pa.array([[1, 0], None], ANNOTATION_COLUMNS["present"])}),
        pa.table({"mask": pa.array([None], pa.binary())}),
        pa.table({"mask": pa.array([1.5])}),
        pa.table(
            {
                "boxes": pa.array(
                    [[{"left": 0, "top": 0, "right": 1, "bottom": 1, "class": 2, "difficult": False}]],
                    ANNOTATION_COLUMNS["boxes"],
                )
            }
        ),
        pa.table({"boxes": pa.array([[3]])}),
    ],
)
def test_columns_of_wrong_content_are_refused(table: pa.Table) -> None:
    with pytest.raises((ValueError, TypeError, pa.ArrowException)):
        unpack_columns(table, 2)


def test_targets_are_those_of_the_tasks() -> None:
    assert get_args(Target) == get_args(TargetKind)

"""The columns of images and labels, whatever types they have."""

import base64
from typing import Any

import pyarrow as pa
import pytest

from firstlight.pipeline.data.sources.conventions.parquet_columns import (
    decode_image_text,
    find_image_column,
    find_label_column,
    is_bytes_type,
    read_hugging_face_classes,
    require_one_column,
    take_image,
    unwrap_type,
)
from firstlight.pipeline.errors import UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (pa.binary(), ("image",)),
        (pa.large_binary(), ("image",)),
        (pa.binary_view(), ("image",)),
        (pa.binary(4), ("image",)),
        (pa.dictionary(pa.int32(), pa.binary()), ("image",)),
        (pa.string(), ("image",)),
        (pa.list_(pa.binary()), ("image",)),
        (STRUCT, ("image", "bytes")),
        (pa.list_(STRUCT), ("image", "bytes")),
    ],
)
def test_types_of_images(kind: pa.DataType, found: tuple[str, ...]) -> None:
    assert find_image_column("image", pa.schema([("image", kind), ("label", pa.int64())]), "x") == (found, "")


def test_other_names_of_the_default_column_are_reported() -> None:
    schema = pa.schema([("img", pa.binary()), ("label", pa.int64())])
    assert find_image_column("image", schema, "x") == (
        ("img",),
        "dataset.image_column: there is no 'image', 'img' is taken",
    )
    only = pa.schema([("pixels", STRUCT), ("label", pa.int64())])
    assert find_image_column("image", only, "x")[0] == ("pixels", "bytes")
    assert find_label_column("label", pa.schema([("Class", pa.bool_())]), "x").name == "Class"
    for wanted in ("pic", "label", "img.bytes"):
        with pytest.raises(UserError, match=rf"dataset\.image_column: '{wanted}' is no column of bytes"):
            find_image_column(wanted, schema, "x")
    with pytest.raises(UserError, match=r"dataset\.image_column: 'image' is no column of bytes"):
        find_image_column("image", pa.schema([("a", pa.binary()), ("b", pa.binary())]), "x")
    with pytest.raises(
        UserError, match=r"dataset\.label_column: 'label' is no column of integers or text in x; columns: "
    ):
        find_label_column("label", pa.schema([("label", STRUCT)]), "x")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"x", (b"x", None, None)),
        ({"bytes": b"x", "path": "p"}, (b"x", "p", None)),
        ([b"x"], (b"x", None, None)),
        ([{"bytes": b"x", "path": None}], (b"x", None, None)),
        (base64.b64encode(b"x").decode(), (b"x", None, None)),
        ("data:image/png;base64," + base64.b64encode(b"\xfb\xff").decode(), (b"\xfb\xff", None, None)),
        (base64.urlsafe_b64encode(b"\xfb\xff").decode(), (b"\xfb\xff", None, None)),
        (None, (None, None, "the row has no image (null)")),
        ([], (None, None, "the row has no image (null)")),
        ({"bytes": None, "path": "p"}, (None, "p", "the row has no image (null)")),
        ([b"x", b"y"], (None, None, "the row has 2 images")),
        ("im/0.jpg", (None, None, "is text that is no Base64: im/0.jpg")),
    ],
)
def test_image_of_a_cell(value: Any, found: tuple[bytes | None, str | None, str | None]) -> None:
    assert take_image(value, "bytes") == found


def test_text_that_is_no_base64_raises() -> None:
    assert decode_image_text("eHh4\neHg=") == b"xxxxx"
    with pytest.raises(ValueError, match="is text that is no Base64: "):
        decode_image_text("a")


def test_types_within_lists_and_dictionaries() -> None:
    assert unwrap_type(pa.list_(pa.dictionary(pa.int8(), pa.binary_view()))) == pa.binary_view()
    assert not is_bytes_type(pa.string())


def test_classes_and_columns_of_several_files() -> None:
    assert read_hugging_face_classes(pa.schema([("label", pa.int64())]), "label") == ()
    assert require_one_column([(("a",), "t"), (("a",), "")], "a", "x") == (("a",), "t")
    with pytest.raises(UserError, match=r"dataset\.image_column: 'a' is not of one type in all files of 'x'"):
        require_one_column([(("a",), ""), (("a", "bytes"), "")], "a", "x")

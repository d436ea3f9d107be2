"""Annotation files of VOC: valid ones, and hostile ones that become a reason."""

import time
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.data.sources.published.voc_xml import (
    BOX_SIDES,
    MAX_XML_BYTES,
    InvalidObjects,
    VocAnnotation,
    VocObject,
    parse_class_names,
    parse_objects,
)

DOG = """<object><name>dog</name><difficult>1</difficult>
  <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  <bndbox><xmax>20</xmax><xmin>8</xmin><ymax>31.5</ymax><ymin>12</ymin></bndbox></object>"""
CAT = "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>1</xmax><ymax>2</ymax></bndbox><name> cat\n</name></object>"


def xml(*objects: str) -> bytes:
    return f"<annotation><size><width>40</width></size>{''.join(objects)}</annotation>".encode()


def test_objects_have_zero_based_edges() -> None:
    """Numbers from 1 with both ends become edges; the parts of an object are none; no `difficult` means no."""
    objects = [VocObject("dog", (7, 11, 20, 31.5), True), VocObject("cat", (0, 0, 1, 2), False)]
    assert parse_objects(xml(DOG, CAT)) == VocAnnotation(objects, None, Counter())
    assert parse_objects(xml()) == VocAnnotation([], None, Counter())
    assert parse_objects(b"\xef\xbb\xbf" + xml(CAT)) == parse_objects(xml(CAT))
    assert parse_objects(xml(CAT).decode().encode("utf-16")) == parse_objects(xml(CAT))
    assert parse_class_names(xml(DOG, CAT)) == {"dog", "cat"}


LAUGHS = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10 if k else "ha"}">' for k in range(12))
BOMB = f"<!DOCTYPE x [{LAUGHS}]><annotation><object><name>&l11;</name></object></annotation>"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (BOMB.encode(), "has a document type"),
        (BOMB.encode("utf-16"), "has a document type"),
        (b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>', "has a document type"),
        (b'<!DOCTYPE a SYSTEM "http://127.0.0.1/x.dtd"><annotation/>', "has a document type"),
        (b"<annotation>&undefined;</annotation>", "is not well-formed XML"),
        (b"", "is not well-formed XML"),
        (b"\0" * 100, "is not well-formed XML"),
        (b'<?xml version="1.0" encoding="no-such"?><annotation/>', "is not well-formed XML"),
        (xml(DOG)[:-20], "is not well-formed XML"),
        (b"<annotation>" + b" " * MAX_XML_BYTES + b"</annotation>", "is larger than 1,000,000 bytes"),
    ],
    ids=range(10),
)
def test_invalid_file_has_reason(data: bytes, why: str) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidObjects) as error:
        parse_objects(data)
    assert why in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert parse_class_names(data) == set()
    assert time.monotonic() - start < 5


@given(st.binary(max_size=200) | st.text(alphabet="<>/!&;[]annotationobject name", max_size=200).map(str.encode))
def test_any_bytes_give_objects_or_reason(data: bytes) -> None:
    with suppress(InvalidObjects):
        assert isinstance(parse_objects(data), VocAnnotation)


def test_deeply_nested_file_is_parsed() -> None:
    assert parse_objects(b"<a>" * 100_000 + b"</a>" * 100_000).objects == []


@pytest.mark.parametrize(
    "sides",
    [
        "<xmin>1</xmin><ymin>1</ymin><ymax>2</ymax>",
        "<xmin>1</xmin><ymin>1</ymin><xmax>one</xmax><ymax>2</ymax>",
        "<xmin>1</xmin><ymin>1</ymin><xmax>nan</xmax><ymax>2</ymax>",
        "<xmin>1</xmin><ymin>1</ymin><xmax>1e999</xmax><ymax>2</ymax>",
        "<xmin/><ymin/><xmax/><ymax/>",
        None,
    ],
)
def test_object_without_a_box_of_numbers_keeps_its_name(sides: str | None) -> None:
    box = "" if sides is None else f"<bndbox>{sides}</bndbox>"
    found = parse_objects(xml(CAT, f"<object><name>dog</name>{box}</object>"))
    assert [(one.name, one.box) for one in found.objects] == [("cat", (0, 0, 1, 2)), ("dog", None)]
    assert found.readings == {"object_without_box": 1}


@pytest.mark.parametrize("name", ["", "<name/>", "<name>  \n</name>"])
def test_object_without_a_name_is_left_out(name: str) -> None:
    found = parse_objects(xml(f"<object>{name}<bndbox/></object>", CAT))
    assert [one.name for one in found.objects] == ["cat"]
    assert found.readings == {"object_unnamed": 1}


@pytest.mark.parametrize(
    ("sides", "box"), [((9, 2, 3, 8), (2, 1, 9, 8)), ((3, 8, 9, 2), (2, 1, 9, 8)), ((9, 8, 3, 2), (2, 1, 9, 8))]
)
def test_swapped_ends_are_read_in_order(sides: tuple[int, ...], box: tuple[int, ...]) -> None:
    tags = "".join(f"<{side}>{value}</{side}>" for side, value in zip(BOX_SIDES, sides, strict=True))
    found = parse_objects(xml(f"<object><name>dog</name><bndbox>{tags}</bndbox></object>"))
    assert [one.box for one in found.objects] == [box]
    assert found.readings == {"box_swapped": 1}


@pytest.mark.parametrize(
    ("text", "difficult", "reading"),
    [
        ("0", False, None),
        ("1", True, None),
        ("", False, None),
        (" 1 ", True, None),
        ("Unspecified", False, "difficult_as_no"),
        ("false", False, "difficult_as_no"),
        ("True", True, "difficult_as_yes"),
        ("yes", True, "difficult_as_yes"),
        ("2", True, "difficult_as_yes"),
        ("0.0", False, "difficult_as_no"),
        ("-1", False, "difficult_as_no"),
        ("nan", False, "difficult_as_no"),
    ],
)
def test_values_of_difficult_are_read_and_reported(text: str, difficult: bool, reading: str | None) -> None:
    found = parse_objects(xml(DOG.replace("<difficult>1<", f"<difficult>{text}<")))
    assert found.objects[0].difficult is difficult
    assert found.readings == ({reading: 1} if reading else {})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("<width>40</width><height>30</height><depth>3</depth>", (40, 30)),
        ("<width>40.0</width><height>30</height>", (40, 30)),
        ("<width>0</width><height>0</height>", None),
        ("<width>40</width>", None),
        ("<width>inf</width><height>1</height>", None),
        ("<width>-4</width><height>9</height>", None),
    ],
)
def test_stated_size_is_read_if_it_is_one(size: str, expected: tuple[int, int] | None) -> None:
    assert parse_objects(f"<annotation><size>{size}</size></annotation>".encode()).size == expected

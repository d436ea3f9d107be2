"""Annotation files of VOC: valid ones, and hostile ones that become a reason."""

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.data.sources.published.voc_xml import (
    MAX_XML_BYTES,
    InvalidObjects,
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
    assert parse_objects(xml(DOG, CAT)) == [
        VocObject("dog", (7, 11, 20, 31.5), True),
        VocObject("cat", (0, 0, 1, 2), False),
    ]
    assert parse_objects(xml()) == []
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
        (xml(CAT, "<object><name>dog</name></object>"), "object 2: has no bndbox"),
        (xml(CAT.replace(" cat\n", "")), "object 1: has no name"),
        (xml(CAT.replace("<xmax>1</xmax>", "")), "object 1: xmax 'is missing' is no number"),
        (xml(CAT.replace("<xmax>1</xmax>", "<xmax>one</xmax>")), "object 1: xmax 'one' is no number"),
        (xml(CAT.replace("<xmax>1</xmax>", "<xmax>nan</xmax>")), "object 1: xmax 'nan' is no number"),
        (xml(CAT.replace("<xmax>1</xmax>", "<xmax>1e999</xmax>")), "object 1: xmax '1e999' is no number"),
        (
            xml(DOG.replace("<difficult>1<", "<difficult>Unspecified<")),
            "object 1: difficult 'Unspecified' is not valid; valid: 0, 1",
        ),
    ],
    ids=range(17),
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
        assert isinstance(parse_objects(data), list)


def test_deeply_nested_file_is_parsed() -> None:
    assert parse_objects(b"<a>" * 100_000 + b"</a>" * 100_000) == []

"""The objects in an annotation file of PASCAL VOC.

The XML comes from outside: its size is limited, and a DTD is refused, as it could declare entities. VOC counts pixels
from 1 and its boxes include both ends, so left = xmin - 1 and right = xmax, likewise downwards; all sets in its layout
are read so.
"""

import math
from typing import NamedTuple, NoReturn
from xml.etree import ElementTree

from firstlight.pipeline.errors import one_line

MAX_XML_BYTES = 1_000_000


class VocObject(NamedTuple):
    """One object. `box` is left, top, right, bottom in pixels, as in `annotations.Annotation`."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


class InvalidObjects(ValueError):
    """The file cannot be used; the text is a short reason on one line."""


class _DtdRefuser(ElementTree.TreeBuilder):
    def doctype(self, name: str, public: str | None, system: str | None) -> NoReturn:
        raise InvalidObjects("has a document type (<!DOCTYPE ...>), which is not read; valid: plain XML")


def parse_objects(data: bytes) -> list[VocObject]:
    """Returns the objects in the order of the file. The parts of an object (heads, hands) are no objects.

    Raises:
        InvalidObjects: the file is too large or no plain XML, or an object lacks its name or a number of its box.
    """
    return [_parse_object(number, found) for number, found in enumerate(_parse_root(data).findall("object"), 1)]


def parse_class_names(data: bytes) -> set[str]:
    """Returns the names of the objects in a file; an empty set if the file cannot be used."""
    try:
        return {found.name for found in parse_objects(data)}
    except InvalidObjects:
        return set()


def _parse_root(data: bytes) -> ElementTree.Element:
    if len(data) > MAX_XML_BYTES:
        raise InvalidObjects(f"is larger than {MAX_XML_BYTES:,} bytes")
    try:
        # Without a DTD, there are no entities that could expand
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_DtdRefuser()))  # noqa: S314
    except InvalidObjects:
        raise
    # ValueError and LookupError concern the encoding
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InvalidObjects(f"is not well-formed XML: {one_line(error, 100)}") from None


def _parse_object(number: int, found: ElementTree.Element) -> VocObject:
    name, difficult = (found.findtext("name") or "").strip(), (found.findtext("difficult") or "0").strip()
    if not name:
        raise InvalidObjects(f"object {number}: has no name")
    if difficult not in ("0", "1"):
        raise InvalidObjects(f"object {number}: difficult {difficult[:20]!r} is not valid; valid: 0, 1")
    box = found.find("bndbox")
    if box is None:
        raise InvalidObjects(f"object {number}: has no bndbox")
    xmin, ymin, xmax, ymax = (
        _parse_number(number, side, box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    return VocObject(name, (xmin - 1, ymin - 1, xmax, ymax), difficult == "1")


def _parse_number(number: int, side: str, value: str | None) -> float:
    try:
        found = float(value or "")
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InvalidObjects(f"object {number}: {side} {(value or 'is missing').strip()[:20]!r} is no number")
    return found

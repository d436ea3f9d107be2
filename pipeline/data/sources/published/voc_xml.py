"""The objects that an annotation file of PASCAL VOC tells of: XML from outside, so of limited size, and without a DTD, which could declare entities.

VOC counts pixels from 1 and its boxes include both ends, so left = xmin - 1 and right = xmax, likewise down: all sets in its layout are read so.
"""

import math
from typing import NamedTuple, NoReturn
from xml.etree import ElementTree

MAX_BYTES = 1_000_000


class Thing(NamedTuple):
    """One object."""

    name: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels, as `annotations.Annotation` has them
    difficult: bool


class BadObjects(ValueError):
    """The file cannot be used; the text is a short reason of one line."""


class _NoDtd(ElementTree.TreeBuilder):
    def doctype(self, name: str, public: str | None, system: str | None) -> NoReturn:
        raise BadObjects("has a document type (<!DOCTYPE ...>), which is not read; valid: plain XML")


def things(data: bytes) -> list[Thing]:
    """In the order of the file; the parts of objects (heads, hands) are no objects.

    Raises:
        BadObjects: it is too large or no plain XML, or an object lacks its name or a number of its box.
    """
    return [_thing(number, found) for number, found in enumerate(_root(data).findall("object"), 1)]


def names(data: bytes) -> set[str]:
    """Of the objects in it; none, if it cannot be used."""
    try:
        return {thing.name for thing in things(data)}
    except BadObjects:
        return set()


def _root(data: bytes) -> ElementTree.Element:
    if len(data) > MAX_BYTES:
        raise BadObjects(f"is larger than {MAX_BYTES:,} bytes")
    try:
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDtd()))  # noqa: S314 - no DTD, so no entities
    except BadObjects:
        raise
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the two last over its encoding
        raise BadObjects(f"is not well-formed XML: {' '.join(str(error).split())[:100]}") from None


def _thing(number: int, found: ElementTree.Element) -> Thing:
    name, difficult = (found.findtext("name") or "").strip(), (found.findtext("difficult") or "0").strip()
    if not name:
        raise BadObjects(f"object {number}: has no name")
    if difficult not in ("0", "1"):
        raise BadObjects(f"object {number}: difficult {difficult[:20]!r} is not valid; valid: 0, 1")
    box = found.find("bndbox")
    if box is None:
        raise BadObjects(f"object {number}: has no bndbox")
    xmin, ymin, xmax, ymax = (_number(number, side, box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax"))
    return Thing(name, (xmin - 1, ymin - 1, xmax, ymax), difficult == "1")


def _number(number: int, side: str, value: str | None) -> float:
    try:
        found = float(value or "")
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadObjects(f"object {number}: {side} {(value or 'is missing').strip()[:20]!r} is no number")
    return found

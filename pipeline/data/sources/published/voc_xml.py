"""The objects in an annotation file of PASCAL VOC.

The XML comes from outside: its size is limited, and a DTD is refused, as it could declare entities. VOC counts pixels
from 1 and its boxes include both ends, so left = xmin - 1 and right = xmax, likewise downwards; all sets in its layout
are read so.

An incomplete object is left out and counted, and its image is kept.
"""

import math
from collections import Counter
from typing import NamedTuple, NoReturn
from xml.etree import ElementTree

from firstlight.pipeline.errors import one_line

MAX_XML_BYTES = 1_000_000
BOX_SIDES = ("xmin", "ymin", "xmax", "ymax")
# Words that stand for 1 in `difficult`; numbers above 0 do so, too. All others stand for 0.
YES_WORDS = ("true", "yes", "y", "t", "on")
Box = tuple[float, float, float, float]


class VocObject(NamedTuple):
    """One object. `box` is left, top, right, bottom in pixels, as in `annotations.Annotation`; None if it has none."""

    name: str
    box: Box | None
    difficult: bool


class VocAnnotation(NamedTuple):
    """The content of a file."""

    objects: list[VocObject]
    # Width and height of the image, None if the file does not state them.
    size: tuple[int, int] | None
    # The conventions that were assumed (`readings.READING_SENTENCES`), with the number of objects.
    readings: Counter[str]


class InvalidObjects(ValueError):
    """The file cannot be used; the text is a short reason on one line."""


class _DtdRefuser(ElementTree.TreeBuilder):
    def doctype(self, name: str, public: str | None, system: str | None) -> NoReturn:
        raise InvalidObjects("has a document type (<!DOCTYPE ...>), which is not read; valid: plain XML")


def parse_objects(data: bytes) -> VocAnnotation:
    """Returns the objects in the order of the file. The parts of an object (heads, hands) are no objects.

    An object without a name is left out.

    Raises:
        InvalidObjects: the file is too large or no plain XML, or its boxes are fractions of the image.
    """
    root, readings = _parse_root(data), Counter[str]()
    _refuse_fractions(root)
    parsed = [_parse_object(found, readings) for found in root.findall("object")]
    return VocAnnotation([found for found in parsed if found is not None], _parse_size(root), readings)


def parse_class_names(data: bytes) -> set[str]:
    """Returns the names of the objects in a file; an empty set if the file is too large or no plain XML."""
    try:
        names = {(found.findtext("name") or "").strip() for found in _parse_root(data).findall("object")}
    except InvalidObjects:
        return set()
    return names - {""}


def _parse_root(data: bytes) -> ElementTree.Element:
    if len(data) > MAX_XML_BYTES:
        raise InvalidObjects(f"is larger than {MAX_XML_BYTES:,} bytes")
    try:
        # There are no entities that could expand without a DTD
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_DtdRefuser()))  # noqa: S314
    except InvalidObjects:
        raise
    # ValueError and LookupError concern the encoding
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InvalidObjects(f"is not well-formed XML: {one_line(error, 100)}") from None


def _refuse_fractions(root: ElementTree.Element) -> None:
    """Raises InvalidObjects if all positions of the boxes are in 0..1 and some are fractions: they are no pixels."""
    texts = [box.findtext(side) for box in root.findall("object/bndbox") for side in BOX_SIDES]
    numbers = [number for text in texts if (number := _parse_number(text)) is not None]
    if numbers and all(0.0 <= number <= 1.0 for number in numbers) and not all(map(float.is_integer, numbers)):
        raise InvalidObjects(
            f"has boxes in fractions of the image, e.g. {texts[0]}; valid: pixels, as in <xmin>48</xmin>"
        )


def _parse_object(found: ElementTree.Element, readings: Counter[str]) -> VocObject | None:
    name = (found.findtext("name") or "").strip()
    if not name:
        readings["object_unnamed"] += 1
        return None
    return VocObject(name, _parse_box(found.find("bndbox"), readings), _parse_difficult(found, readings))


def _parse_difficult(found: ElementTree.Element, readings: Counter[str]) -> bool:
    text = (found.findtext("difficult") or "0").strip().lower()
    if text in ("0", "1"):
        return text == "1"
    number = _parse_number(text)
    is_difficult = text in YES_WORDS if number is None else number > 0
    readings["difficult_as_yes" if is_difficult else "difficult_as_no"] += 1
    return is_difficult


def _parse_box(found: ElementTree.Element | None, readings: Counter[str]) -> Box | None:
    sides = [None if found is None else _parse_number(found.findtext(side)) for side in BOX_SIDES]
    xmin, ymin, xmax, ymax = sides
    if xmin is None or ymin is None or xmax is None or ymax is None:
        readings["object_without_box"] += 1
        return None
    if xmin > xmax or ymin > ymax:
        readings["box_swapped"] += 1
        (xmin, xmax), (ymin, ymax) = sorted((xmin, xmax)), sorted((ymin, ymax))
    return xmin - 1, ymin - 1, xmax, ymax


def _parse_number(value: str | None) -> float | None:
    """Returns a finite number, None if the text is none."""
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Returns the width and height that a file states. Some tools write 0 where they did not look."""
    width, height = (_parse_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    return (int(width), int(height)) if width and height and min(width, height) >= 1 else None

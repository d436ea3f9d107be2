"""The sentences about the conventions that were assumed for a data set."""

import ast
import inspect

import pytest

from firstlight.pipeline.data import annotations, readings
from firstlight.pipeline.data.images import class_maps, decode, levels, repair
from firstlight.pipeline.data.prepare import fitting, jobs
from firstlight.pipeline.data.readings import READING_SENTENCES, describe_readings, describe_refused
from firstlight.pipeline.data.sources.published import voc_xml

LEVELS = {"black": 0.0, "white": 4095.0, "lowest": 0.0, "highest": 3071.0, "images": 12, "dark": 0, "flat": 0}


def test_every_name_that_is_counted_has_a_sentence() -> None:
    """And every sentence is of a name that is counted somewhere."""
    sources = [
        inspect.getsource(module)
        for module in (annotations, class_maps, decode, levels, repair, fitting, jobs, voc_xml)
    ]
    texts = {node.value for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    formats = {f"mask_{kind.lower()}" for kind in class_maps.LOSSLESS_FORMATS if kind != "PNG"}
    assert READING_SENTENCES.keys() <= texts | formats
    assert formats <= READING_SENTENCES.keys()


def test_readings_are_reported_with_their_numbers() -> None:
    images = {"readings": {"box_swapped": 3, "one_colour": 1200}}
    assert describe_readings(images, ()) == [
        "images of one colour: 1,200",
        "boxes whose ends were swapped, read in order: 3",
    ]
    assert describe_readings({}, ("cat",)) == []


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (
            "16-bit grey",
            {},
            "12 images of 16-bit grey have levels 0 to 3,071: 0 is black, 4,095 is white "
            "(dataset.depth sets the number of bits)",
        ),
        ("16-bit grey", {"white": 65535.0, "highest": 60000.0}, None),
        ("16-bit grey", {"white": 65535.0, "dark": 11}, "11 of them use less than a sixteenth of the range"),
        ("16-bit colour", {"flat": 12, "white": 65535.0}, "12 of them have one colour, or nearly so"),
        ("floats", {"white": 0.0625, "highest": 0.0625}, "levels 0 to 0.0625: 0 is black, 0.0625 is white"),
        ("integers", {"lowest": -1024.0, "black": -1024.0}, "levels -1,024 to 3,071: -1,024 is black"),
    ],
)
def test_levels_are_reported_unless_they_are_plain(kind: str, changes: dict[str, float], told: str | None) -> None:
    lines = describe_readings({"levels": {kind: {**LEVELS, **changes}}}, ())
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]
    assert "dataset.depth" not in "".join(lines) or kind != "floats"


def test_absent_classes_are_named_by_split() -> None:
    classes = tuple("abcdefgh")
    found = {
        "train": {"present": {"0": 2}, "boxes": {"0": 5, "1": 0}},
        "test": {"pixels": {"0": 5, "255": 3, **{str(k): 1 for k in range(2, 8)}}},
    }
    assert describe_readings({"annotated": found}, classes) == [
        "train: 7 of the 8 classes do not occur: b, c, d, e, f, g and 1 more",
        "test: 1 of the 8 classes do not occur: b; 255 is read as void, unless dataset.mask_values names its class",
    ]
    assert readings.MAX_NAMED_CLASSES == 6


def test_refused_images_are_counted_by_kind() -> None:
    assert describe_refused({"refused": {"truncated": 2, "too large": 1200}}) == " (1,200 too large, 2 truncated)"
    assert describe_refused({}) == ""

"""Labels by number and by name, texts that stand for none, near-twins, and the file of class names."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.sources.labels import (
    MAX_CLASSES,
    LabelReading,
    is_label_type,
    read_class_names,
    read_labels,
    simplify_labels,
)
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options


def read(values: list[Any], known: tuple[str, ...] = (), listed: str = "", **options: Any) -> LabelReading:
    found = pa.chunked_array([pa.array(values)])
    return read_labels(
        found, known, lambda k: f"row {k}", dataset_options(source="list", list="x.csv", **options), listed
    )


def number(values: list[Any], known: tuple[str, ...] = (), **options: Any) -> tuple[tuple[str, ...], list[int]]:
    classes, labels, _ = read(values, known, **options)
    return classes, labels.tolist()


def test_numbers_from_zero_on_are_classes() -> None:
    assert number([2, None, 0, 1, -1]) == (("0", "1", "2"), [2, -1, 0, 1, -1])
    assert read([2, None, 0, 1, -1]).notes == ("no label: 2 images (-1 1, empty 1)",)
    assert read([2, 0, 1]).notes == read([None, -1]).notes == ()


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [([1, 2, 3], ("1", "2", "3"), [0, 1, 2]), ([0, 3000], ("0", "3000"), [0, 1]), (["10", "20"], ("10", "20"), [0, 1])],
)
def test_numbers_with_gaps_are_named_by_themselves_and_reported(
    values: list[Any], classes: tuple[str, ...], labels: list[int]
) -> None:
    found = read(values)
    assert (found.classes, found.labels.tolist()) == (classes, labels)
    assert found.notes[0].startswith(f"labels are {len(classes)} numbers from {classes[0]} to {classes[-1]}: each that")


def test_names_become_sorted_classes() -> None:
    assert number(["dog", None, "cat"]) == (("cat", "dog"), [1, -1, 0])


def test_known_classes_keep_their_order() -> None:
    assert number(["dog", "cat"], ("dog", "cat", "emu")) == (("dog", "cat", "emu"), [0, 1])
    assert number([1, 0], ("dog", "cat")) == (("dog", "cat"), [1, 0])
    assert number(["1.0", "0.0"], ("dog", "cat")) == (("dog", "cat"), [1, 0])


def test_numbers_that_are_names_are_read_as_names() -> None:
    assert number(["2", "1"], ("1", "2")) == (("1", "2"), [1, 0])
    found = read([2, 1], ("1", "2"), "x.txt")
    assert found.labels.tolist() == [1, 0]
    assert found.notes == ("labels are read as the names that x.txt lists, not as numbers from 0 on",)


def test_numbers_from_one_on_fit_as_many_classes() -> None:
    found = read([1, 2, 3], ("ant", "bee", "cow"), "x.txt")
    assert found.labels.tolist() == [0, 1, 2]
    assert found.notes == ("labels run from 1 to 3, as many as there are classes: 1 is 'ant'",)


@pytest.mark.parametrize("text", ["", " ", "NaN", "nan", "None", "N/A", "NULL", "<NA>", "na", "#N/A"])
def test_texts_for_no_label_are_no_class_and_are_reported(text: str) -> None:
    found = read(["cat", text, "dog", None])
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [0, -1, 1, -1])
    (note,) = found.notes
    seen = f"({text.strip()!r} 1, empty 1)" if text.strip() else "(empty 2)"
    assert note.startswith(f"no label: 2 images {seen}")
    assert ("dataset.missing_labels=[]" in note) == bool(text.strip())


def test_texts_for_no_label_are_classes_if_they_are_listed_or_asked_for() -> None:
    assert number(["None", "cat"], ("None", "cat")) == (("None", "cat"), [0, 1])
    assert number(["NA", "EU", ""], missing_labels=[]) == (("EU", "NA"), [1, 0, -1])


def test_spaces_are_left_out_and_twins_are_reported() -> None:
    found = read(["cat", "cat ", "Cat", " cat", "dog"])
    assert (found.classes, found.labels.tolist()) == (("Cat", "cat", "dog"), [1, 1, 0, 1, 2])
    assert found.notes == (
        "2 labels with spaces around: read without them",
        "classes that look alike are kept apart: 'Cat' (1) and 'cat' (3); dataset.label_case=lower reads each as one",
    )
    assert number(["cat", "cat ", "Cat"], label_case="lower") == (("cat",), [0, 0, 0])


@pytest.mark.parametrize(
    ("one", "other"), [("cafe\u0301", "caf\u00e9"), ("big  cat", "Big cat"), ("STRASSE", "straße")]
)
def test_other_twins_are_reported(one: str, other: str) -> None:
    (note,) = read([one, other]).notes
    assert note.startswith("classes that look alike are kept apart: ")


def test_listed_class_is_found_whatever_its_case() -> None:
    found = read(["Cat", "dog", "cat"], ("cat", "dog"), "x.txt")
    assert found.labels.tolist() == [0, 1, 0]
    assert found.notes == ("labels read as the class that x.txt spells otherwise: 'Cat' as 'cat' 1",)


def test_fractions_as_text_are_reported() -> None:
    assert read(["0.5", "1.5"]).notes[0].startswith("labels are numbers that are not whole, e.g. 0.5")


@pytest.mark.parametrize(
    ("values", "known", "message"),
    [
        ([0, 2], ("a", "b"), "row 1: label 2 is out of range: x.txt has 2 classes; valid: 0 to 1"),
        ([0, -2], ("a",), "row 1: label -2 is out of range: x.txt has 1 classes; valid: 0 to 0"),
        (["a", "c"], ("a", "b"), "row 1: label 'c' is out of range: x.txt has 2 classes; valid: a, b"),
        ([MAX_CLASSES], (), f"row 0: label {MAX_CLASSES} is out of range"),
        ([0, -2], (), "row 1: label -2 is out of range"),
    ],
)
def test_label_without_class_names_row_and_valid_labels(
    values: list[Any], known: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^{message}"):
        read(values, known, "x.txt")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pa.array([True, None, False]), ["True", None, "False"]),
        (pa.array([0.0, 1.0, None, float("nan")]), [0, 1, None, None]),
        (pa.array([Decimal("3.00"), None]), [3, None]),
        (pa.array([1, 2], pa.uint8()), [1, 2]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.array(["a"], pa.large_string()), ["a"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([[1], [], None, [2]]), [1, None, None, 2]),
        (pa.array([None, None]), [None, None]),
    ],
)
def test_types_are_simplified(values: pa.Array, found: list[Any]) -> None:
    assert is_label_type(values.type)
    simple = simplify_labels(pa.chunked_array([values]))
    assert simple.to_pylist() == found
    assert simple.type in (pa.string(), pa.int64())


def test_types_without_labels_are_refused() -> None:
    assert not is_label_type(pa.struct([("x", pa.int64())]))
    assert not is_label_type(pa.array([datetime.date(2020, 1, 1)]).type)
    with pytest.raises(ValueError, match=r"holds numbers that are not whole, e\.g\. 0\.5"):
        simplify_labels(pa.chunked_array([pa.array([1.0, 0.5])]))
    with pytest.raises(ValueError, match=r"holds several labels in row 1: \[1, 2\]"):
        simplify_labels(pa.chunked_array([pa.array([[1], [1, 2]])]))


def test_class_names_are_lines(tmp_path: Path) -> None:
    assert read_class_names(LocalFiles(tmp_path)) == ()
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfant\n bee \n")
    assert read_class_names(LocalFiles(tmp_path)) == ("ant", "bee")


@pytest.mark.parametrize("content", [b"ant\nant\n", b"ant\n\nbee\n", b"", b"caf\xe9\n"])
def test_invalid_class_names_raise(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"classes\.txt: (must list every class once|cannot be read as UTF-8)"):
        read_class_names(LocalFiles(tmp_path))

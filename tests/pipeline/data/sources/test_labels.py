"""Labels by number and by name, and the file of class names."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.sources.labels import MAX_CLASSES, number_labels, parse_integers, read_class_names
from firstlight.pipeline.errors import UserError


def number(values: list[Any], known: tuple[str, ...] = (), listed: str = "") -> tuple[tuple[str, ...], list[int]]:
    classes, labels = number_labels(pa.chunked_array([pa.array(values)]), known, lambda k: f"row {k}", listed)
    return classes, labels.tolist()


def test_numbers_count_classes_from_zero() -> None:
    assert number([2, None, 0, -1]) == (("0", "1", "2"), [2, -1, 0, -1])


def test_names_become_sorted_classes() -> None:
    assert number(["dog", None, "cat"]) == (("cat", "dog"), [1, -1, 0])


def test_known_classes_keep_their_order() -> None:
    assert number(["dog", "cat"], ("dog", "cat", "emu")) == (("dog", "cat", "emu"), [0, 1])
    assert number([1, 0], ("dog", "cat")) == (("dog", "cat"), [1, 0])


@pytest.mark.parametrize(
    ("values", "known", "message"),
    [
        ([0, 2], ("a", "b"), "row 1: label 2 is out of range: x.txt has 2 classes; valid: 0 to 1"),
        ([0, -2], (), "row 1: label -2 is out of range: x.txt has 1 classes; valid: 0 to 0"),
        (["a", "c"], ("a", "b"), "row 1: label 'c' is out of range: x.txt has 2 classes; valid: a, b"),
        ([MAX_CLASSES], (), f"row 0: label {MAX_CLASSES} is out of range"),
    ],
)
def test_label_without_class_names_row_and_valid_labels(
    values: list[Any], known: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^{message}"):
        number(values, known, "x.txt")


def test_text_is_parsed_only_if_all_values_are_integers() -> None:
    assert parse_integers(pa.chunked_array([["1", None, "-1"]])).to_pylist() == [1, None, -1]
    assert parse_integers(pa.chunked_array([["1", "x"]])).to_pylist() == ["1", "x"]
    assert parse_integers(pa.chunked_array([pa.array([None, None], pa.string())])).type == pa.string()


def test_class_names_are_lines(tmp_path: Path) -> None:
    assert read_class_names(LocalFiles(tmp_path)) == ()
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfant\n bee \n")
    assert read_class_names(LocalFiles(tmp_path)) == ("ant", "bee")


@pytest.mark.parametrize("content", [b"ant\nant\n", b"ant\n\nbee\n", b"", b"caf\xe9\n"])
def test_invalid_class_names_raise(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"classes\.txt: (must list every class once|cannot be read as UTF-8)"):
        read_class_names(LocalFiles(tmp_path))

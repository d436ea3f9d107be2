"""Checks that the readers of published sets share."""

from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.sources.published.layout import (
    check_labels,
    check_relative_path,
    find_unpacked_folder,
    read_class_lines,
    read_numbered_lines,
    require_files,
)
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, write_named_files


def test_unpacked_folder_is_found_below_root(tmp_path: Path) -> None:
    options = dataset_options(source="cifar10", root=tmp_path)
    assert find_unpacked_folder(options, "a", "b") == tmp_path
    (tmp_path / "b").mkdir()
    assert find_unpacked_folder(options, "a", "b") == tmp_path / "b"


def test_missing_file_lists_content_of_folder(tmp_path: Path) -> None:
    write_named_files(tmp_path, *"abcdefgh")
    require_files(tmp_path, "a", "b")
    with pytest.raises(UserError, match=r"^dataset\.root: .*x' is missing; .* holds 'a', 'b', .*'f' and 2 more$"):
        require_files(tmp_path, "a", "x")


def test_lines_keep_numbers_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one\r\n\n caf\xe9 \n")
    assert read_numbered_lines(tmp_path / "x") == [(1, "one"), (3, "caf\udce9")]


@pytest.mark.parametrize(("content", "reason"), [("a\nb\na\n", "found twice: 'a'"), ("\n", "found none")])
def test_invalid_class_lines_raise(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "x").write_text(content)
    with pytest.raises(UserError, match=reason):
        read_class_lines(tmp_path / "x")


@pytest.mark.parametrize("path", ["/a", "../a", "a/../../b", "", "a\0b"])
def test_path_out_of_root_raises(path: str) -> None:
    with pytest.raises(UserError, match=r"^x: line 1: .* is no path below dataset\.root"):
        check_relative_path(path, "x: line 1")


def test_relative_path_is_normalised() -> None:
    assert check_relative_path("a//./b.jpg", "x") == "a/b.jpg"


def test_label_out_of_range_names_row() -> None:
    check_labels(Path("x"), np.array([1, 3]), 1, 3)
    for labels in ([1, 0], [1, 4]):
        with pytest.raises(UserError, match=rf"^x: row 1: label {labels[1]} is out of range; valid: 1 to 3"):
            check_labels(Path("x"), np.array(labels), 1, 3)

"""Rows of a list: splits, paths that are written otherwise than the files are called, repeated images."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.sources.labels import LabelReading
from firstlight.pipeline.data.sources.list_rows import (
    find_repeated_images,
    merge_labels,
    normalise_paths,
    resolve_paths,
    split_rows,
    spread_label_lists,
)
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, write_named_files


def split(values: list[Any], **options: Any) -> tuple[dict[str, list[int]], dict[str, int]]:
    dataset = dataset_options(source="list", list="x.csv", split_column="part", **options)
    found = split_rows(dataset, pa.table({"path": ["x"] * len(values), "split": values}), "x.csv")
    return {name: rows.tolist() for name, rows in found.rows.items()}, found.left_out


def test_values_are_read_as_names_of_folders_are() -> None:
    assert split(["Train", "TEST", "valid", "training "])[0] == {"train": [0, 3], "val": [2], "test": [1]}
    assert split(["train", "eval"])[0] == {"train": [0], "test": [1]}


def test_given_values_count_and_others_are_left_out() -> None:
    given = {"train": [0, 1, 2], "val": 3, "test": [4]}
    assert split([0, 1, 2, 3, 4, 5], splits=given) == (
        {"train": [0, 1, 2], "val": [3], "test": [4]},
        {"of no split in dataset.splits": 1},
    )
    assert split(["train", "", None], splits={"train": ["train", ""]})[0] == {"train": [0, 1, 2]}
    assert split(["a", "b"], splits={})[0] == {"train": [0, 1]}
    with pytest.raises(
        UserError, match=r"dataset\.splits: names values of a column of x\.csv; valid: dataset\.split_column"
    ):
        split_rows(
            dataset_options(source="list", list="x.csv", splits={"train": "a"}), pa.table({"path": ["x"]}), "x.csv"
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["train", "", None],
            r"x\.csv: 2 rows without a split in 'part', the first is row 1; valid: dataset\.splits={train: t",
        ),
        ([0, 1], r"x\.csv: row 0: 'part' '0' is no name of a split; values: 0, 1; valid: train, val"),
        (["test", "val"], r"dataset\.split_column: no row of x\.csv is of the training split; values: test, val"),
    ],
)
def test_unclear_values_raise(values: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split(values)


def resolve(root: Path, paths: list[str], encoding: str = "utf-8") -> tuple[list[str], list[str]]:
    found, notes = resolve_paths(pa.chunked_array([paths]), LocalFiles(root), encoding, "x.csv")
    return [os.fsdecode(path) for path in found.to_pylist()], notes


def test_other_spellings_of_paths_are_tried_and_reported(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
    write_named_files(tmp_path, "im/0.jpg", "im/1.jpg", "2.jpg", apart)
    with open(os.fsencode(tmp_path) + b"/\xe9.jpg", "wb"):
        pass
    found, notes = resolve(tmp_path, ["im\\0.jpg", ".\\im\\1.jpg", " 2.jpg ", composed, "é.jpg", "none.jpg"], "cp1252")
    assert found == ["im/0.jpg", "im/1.jpg", "2.jpg", apart, "\udce9.jpg", "none.jpg"]
    assert notes == [
        "2 paths read with / for \\",
        "1 path read without spaces around",
        "1 path read in another form of Unicode",
        "1 path read as the bytes of cp1252",
    ]
    assert resolve(tmp_path, ["im/0.jpg", "none.jpg"]) == (["im/0.jpg", "none.jpg"], [])
    assert resolve(tmp_path, ["im/0", "im/x"]) == (["im/0.jpg", "im/x"], ["1 path read with the ending .jpg"])


def test_file_with_a_backslash_in_its_name_is_itself(tmp_path: Path) -> None:
    write_named_files(tmp_path, "im\\0.jpg", "im/0.jpg")
    assert resolve(tmp_path, ["im\\0.jpg"]) == (["im\\0.jpg"], [])


def test_list_of_which_nothing_exists_raises(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^dataset\.list: none of the 2 images of x\.csv exists, e\.g\. '.*/a\.jpg'; valid: da"
    ):
        resolve(tmp_path, ["a.jpg", "b.jpg"])


def test_remote_paths_with_backslashes_are_reported() -> None:
    found, notes = resolve_paths(pa.chunked_array([["a\\0.jpg"]]), RemoteFiles("memory://x"), "utf-8", "x.csv")
    assert (found.to_pylist(), notes) == ([b"a/0.jpg"], ["paths read with / for \\"])


def test_repetitions_of_an_image(tmp_path: Path) -> None:
    paths = pa.array([b"a.jpg", b"./a.jpg", b"", b"b/../a.jpg", b"", b"c.jpg"])
    assert normalise_paths(paths, LocalFiles(tmp_path)).to_pylist() == [
        b"a.jpg",
        b"a.jpg",
        b"",
        b"a.jpg",
        b"",
        b"c.jpg",
    ]
    found = find_repeated_images(paths, LocalFiles(tmp_path))
    assert found.kept.tolist() == [0, 2, 4, 5]
    assert found.repetitions.tolist() == [1, 3]
    (note,) = found.describe_splits({"train": np.array([0, 2, 3, 4]), "test": np.array([1, 5])}, paths)
    assert note == ("1 image listed in two splits, and read in the first: ./a.jpg in row 0 (training) and row 1 (test)")


def merge(labels: list[int], *, has_several: bool) -> tuple[list[int], list[list[int]] | None]:
    paths = pa.array([b"a.jpg", b"b.jpg", b"a.jpg"])
    found = merge_labels(
        LabelReading(("cat", "dog"), np.array(labels)),
        find_repeated_images(paths, LocalFiles(Path("/x"))),
        paths,
        "x.csv",
        has_several,
    )
    return found.single.tolist(), None if found.present is None else found.present.tolist()


def test_two_labels_of_an_image_are_a_conflict_or_both_its_labels() -> None:
    with pytest.raises(
        UserError, match=r"^x\.csv: row 0 and row 2: a\.jpg is 'cat' and 'dog' \(1 image with several labels\); "
    ):
        merge([0, 1, 1], has_several=False)
    assert merge([0, 1, 0], has_several=False)[0] == [0, 1, 0]
    assert merge([-1, 1, 0], has_several=False)[0] == [0, 1, 0]
    assert merge([0, 1, 1], has_several=True) == ([-1, -1, -1], [[1, 1], [0, 1], [-1, -1]])
    assert merge([-1, -1, -1], has_several=True)[1] == [[-1, -1]] * 3


def test_lists_of_labels_become_rows() -> None:
    table = pa.table({"path": ["a", "b", "c", "d"], "label": [["x", "y"], [], None, ["z"]]})
    assert spread_label_lists(table).to_pylist() == [
        {"path": "a", "label": "x"},
        {"path": "a", "label": "y"},
        {"path": "b", "label": None},
        {"path": "c", "label": None},
        {"path": "d", "label": "z"},
    ]
    plain = pa.table({"path": ["a"], "label": ["x"]})
    assert spread_label_lists(plain) is plain

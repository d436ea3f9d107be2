"""Splits by the names of files, splits that are left out or drawn, and what is told of them."""

from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.sources.source_splits import (
    describe_unread,
    lay_end_to_end,
    select_lowest,
    settle_splits,
    split_files,
)
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, list_labels, open_folder_set, write_named_files

OPTIONS = dataset_options(source="parquet", root="x")


def test_added_test_split_is_stratified_and_stable(tmp_path: Path) -> None:
    names = [f"cat/{k}.png" for k in range(40)] + [f"dog/{k}.png" for k in range(10)] + ["emu/0.png"]
    source = open_folder_set(write_named_files(tmp_path, *names), test_fraction=0.2)
    train, test = list_labels(source), list_labels(source, "test")
    assert [label for _, label in test] == [0] * 8 + [1] * 2  # the only emu stays in training
    assert sorted(train + test) == sorted((name, {"c": 0, "d": 1, "e": 2}[name[0]]) for name in names)
    assert [path for path, _ in train] == sorted(path for path, _ in train)
    assert list_labels(open_folder_set(tmp_path, test_fraction=0.2), "test") == test
    assert list_labels(open_folder_set(tmp_path, test_fraction=0.2, split_seed=1), "test") != test
    more = list_labels(
        open_folder_set(write_named_files(tmp_path, *(f"cat/new{k}.png" for k in range(5))), test_fraction=0.2), "test"
    )
    assert len(set(test) & set(more)) >= 8  # of 10: one more cat, and the newcomers that are drawn


def test_zero_fraction_adds_no_test_split(tmp_path: Path) -> None:
    assert open_folder_set(write_named_files(tmp_path, "a/1.png", "a/2.png"), test_fraction=0.0).splits == {"train": 2}
    assert open_folder_set(tmp_path, test_fraction=0.9).splits == {"train": 1, "test": 1}


def test_lowest_ranks_of_each_class_are_selected() -> None:
    ranks, labels = np.array([5, 1, 3, 2, 9, 0], np.uint64), np.array([0, 0, 0, 0, 1, 2])
    assert select_lowest(ranks, labels, 0.5).tolist() == [False, True, False, True, False, False]
    assert select_lowest(ranks, labels, 0.99).tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize(
    ("names", "train", "val", "test", "others"),
    [
        (["train-0", "val-0", "test-0", "x"], ["train-0"], ["val-0"], ["test-0"], ["x"]),
        (["imagenet-train-0.tar", "imagenet-val-0.tar"], ["imagenet-train-0.tar"], ["imagenet-val-0.tar"], [], []),
        (["a/train/0", "a/validation/0", "a/x/0"], ["a/train/0"], ["a/validation/0"], [], ["a/x/0"]),
        (["test-0", "x"], ["x"], [], ["test-0"], []),
        (["x", "y"], ["x", "y"], [], [], []),
        (["test-0", "test-1"], ["test-0", "test-1"], [], [], []),
        (["testset-train-0", "testset-dev-0"], ["testset-train-0"], ["testset-dev-0"], [], []),
    ],
)
def test_names_of_files_define_splits(
    names: list[str], train: list[str], val: list[str], test: list[str], others: list[str]
) -> None:
    found = split_files(names, OPTIONS, "'x'")
    assert found.splits == {"train": train, "val": val, "test": test}
    assert (found.others, found.names) == (others, [*train, *val, *test])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["val-0", "test-0"], r"dataset\.root: val-0, test-0 in 'x': none to train on; valid: dataset\.splits="),
        (
            ["train-0", "val-0", "train-test-0"],
            r"dataset\.root: 'train-test-0' in 'x' names two splits; valid: dataset\.splits=",
        ),
    ],
)
def test_unclear_names_of_files_raise(names: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        split_files(names, OPTIONS, "'x'")


def test_given_patterns_of_files_count() -> None:
    given = dataset_options(source="parquet", root="x", splits={"train": ["a*", "b-1"], "test": "b*"})
    found = split_files(["a-0", "b-0", "b-1", "train-0"], given, "'x'")
    assert found.splits == {"train": ["a-0", "b-1"], "val": [], "test": ["b-0"]}
    assert found.others == ["train-0"]
    none = dataset_options(source="parquet", root="x", splits={})
    assert split_files(["train-0", "test-0"], none, "'x'").splits["train"] == ["train-0", "test-0"]
    with pytest.raises(UserError, match=r"dataset\.splits\.test: \['c\*'\] matches no file in 'x'; files: a-0"):
        split_files(["a-0"], dataset_options(source="parquet", root="x", splits={"train": "a*", "test": "c*"}), "'x'")


def test_files_lie_end_to_end() -> None:
    rows = lay_end_to_end({"train": ["a", "b"], "val": ["c"], "test": []}, [2, 1, 3])
    assert {split: found.tolist() for split, found in rows.items()} == {"train": [0, 1, 2], "val": [3, 4, 5]}


def settle(labels: list[int], **splits: list[int]) -> tuple[dict[str, list[int]], tuple[str, ...], bool]:
    rows = {split: np.array(found) for split, found in splits.items()}
    options = dataset_options(source="folder", root="x", test_fraction=0.5)
    found = settle_splits(rows, [b"%d" % k for k in range(len(labels))], np.array(labels), options)
    return {split: indices.tolist() for split, indices in found.rows.items()}, found.notes, found.draws_test


def test_split_without_labels_is_left_out_and_val_is_tested_on() -> None:
    rows, notes, draws_test = settle([0, 1, 0, -1, -1], train=[0, 1], val=[2], test=[3, 4])
    assert (rows, draws_test) == ({"train": [0, 1], "test": [2]}, False)
    assert notes == (
        "left out, as none has a label: 2 images of the test split; dataset.splits={train: ..., test: ...} keeps them",
        "the held-out split is tested on, as the test split has no labels: 1 image",
    )


def test_test_split_is_drawn_beside_a_held_out_one() -> None:
    rows, notes, draws_test = settle([0, 0, 1, 1, 0, 1], train=[0, 1, 2, 3], val=[4, 5])
    assert list(rows) == ["train", "val", "test"]
    assert (len(rows["train"]), rows["val"], len(rows["test"])) == (2, [4, 5], 2)
    assert (notes, draws_test) == ((), True)


def test_unlabelled_splits_of_an_unlabelled_set_are_kept() -> None:
    assert settle([-1] * 3, train=[0], val=[1], test=[2])[0] == {"train": [0], "val": [1], "test": [2]}
    rows, notes, _ = settle([0, 1, -1, 0], train=[0, 1], val=[2], test=[3])
    assert (rows, len(notes)) == ({"train": [0, 1], "test": [3]}, 1)


def test_unread_note_lists_five_names() -> None:
    assert describe_unread([], "as x") == []
    assert describe_unread(["b\nc", "a"], "as x") == ["not read, as x: a, b\\nc"]
    assert describe_unread("fedcba", "as x") == ["not read, as x: a, b, c, d, e and 1 more"]

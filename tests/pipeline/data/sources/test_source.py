"""The contract of all sources: parts, the added test split, the root."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.sources import SourcePart, open_source
from firstlight.pipeline.data.sources.source import describe_unread, open_local_root, select_lowest, split_by_prefix
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, list_labels, open_folder_set, write_named_files


def test_parts_cover_every_image_once_and_in_order(tmp_path: Path) -> None:
    source = open_folder_set(
        write_named_files(tmp_path, *(f"train/{k:02d}.png" for k in range(7)), *(f"test/{k}.png" for k in range(4)))
    )
    assert source.split_into_parts(3) == [
        SourcePart("train", 0, 3),
        SourcePart("train", 3, 3),
        SourcePart("train", 6, 1),
        SourcePart("test", 0, 3),
        SourcePart("test", 3, 1),
    ]
    paths = [record.path for part in source.split_into_parts(3) for record in source.read(part)]
    assert paths == [f"train/{k:02d}.png" for k in range(7)] + [f"test/{k}.png" for k in range(4)]


@pytest.mark.fault(32, "a root that is none")
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_invalid_root_names_dataset_root(tmp_path: Path, source: str) -> None:
    for root, text in (
        (tmp_path / "missing", "does not exist"),
        (write_named_files(tmp_path, "file.txt") / "file.txt", "is a file"),
        (tmp_path, "no .*in"),
    ):
        with pytest.raises(UserError, match=rf"dataset\.root: .*{text}"):
            open_source(dataset_options(source=source, root=root))


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


def test_sources_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        open_folder_set(write_named_files(tmp_path, "a.jpg")).classes = ("x",)  # type: ignore[misc]


def test_local_source_refuses_bucket() -> None:
    with pytest.raises(
        UserError,
        match=r"^dataset\.root: 's3://b/x' is not on this machine; dataset\.source 'svhn' takes a folder on disk",
    ):
        open_local_root(dataset_options(source="svhn", root="s3://b/x"))


def test_prefixes_of_names_define_splits() -> None:
    assert split_by_prefix(["train-0", "val-0", "test-0", "x"]) == {"train": ["train-0"], "test": ["test-0"]}
    assert split_by_prefix(["train-0", "validation-0"]) == {"train": ["train-0"], "test": ["validation-0"]}
    assert split_by_prefix(["test-0", "x"]) == {"train": ["test-0", "x"], "test": []}


def test_unread_note_lists_five_names() -> None:
    assert describe_unread([], "as x") == ""
    assert describe_unread(["b\nc", "a"], "as x") == "not read, as x: a, b c"
    assert describe_unread("fedcba", "as x") == "not read, as x: a, b, c, d, e ..."


def test_lowest_ranks_of_each_class_are_selected() -> None:
    ranks, labels = np.array([5, 1, 3, 2, 9, 0], np.uint64), np.array([0, 0, 0, 0, 1, 2])
    assert select_lowest(ranks, labels, 0.5).tolist() == [False, True, False, True, False, False]
    assert select_lowest(ranks, labels, 0.99).tolist() == [False, True, True, True, False, False]

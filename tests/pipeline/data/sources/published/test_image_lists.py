"""Sources whose images are named by lists."""

import os
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources.folder import FolderSource
from firstlight.pipeline.data.sources.published.image_lists import (
    ImageListing,
    ListedImage,
    find_facts,
    list_image_files,
    make_listed_source,
)
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, list_labels, read_split, write_named_files


def make_source(root: Path, train: list[str], test: list[str], **fields: float) -> FolderSource:
    listing = ImageListing(
        root,
        ("list.txt",),
        ("a", "b"),
        [ListedImage(path, 0) for path in train],
        [ListedImage(path, 1) for path in test],
    )
    return make_listed_source(FolderSource, listing, dataset_options(source="folder", root=root, **fields))


def test_order_is_that_of_the_lists(tmp_path: Path) -> None:
    write_named_files(tmp_path, "list.txt", "x/2.jpg", "1.jpg", "3.jpg")
    source = make_source(tmp_path, ["x/2.jpg", "1.jpg"], ["3.jpg", "none.jpg"])
    assert list_labels(source) == [("x/2.jpg", 0), ("1.jpg", 0)]
    assert list_labels(source, "test") == [("3.jpg", 1), ("none.jpg", 1)]
    assert [record.reason for record in read_split(source, "test")] == [None, "No such file or directory"]


def test_test_split_is_added_without_test_list(tmp_path: Path) -> None:
    write_named_files(tmp_path, "list.txt", *"abcd")
    assert make_source(tmp_path, list("abcd"), [], test_fraction=0.5).splits == {"train": 2, "test": 2}


def test_duplicates_and_empty_lists_raise(tmp_path: Path) -> None:
    write_named_files(tmp_path, "list.txt", "1.jpg")
    with pytest.raises(UserError, match=r"'1\.jpg' is listed twice; valid: an image is in one split, once"):
        make_source(tmp_path, ["1.jpg"], ["1.jpg"])
    with pytest.raises(UserError, match=r"list\.txt in .*: no image for training is listed"):
        make_source(tmp_path, [], ["1.jpg"])


def test_fingerprint_changes_with_images_and_lists(tmp_path: Path) -> None:
    write_named_files(tmp_path, "list.txt", "1.jpg", "2.jpg")
    seen = {make_source(tmp_path, ["1.jpg"], []).fingerprint, make_source(tmp_path, ["2.jpg"], []).fingerprint}
    for name in ("1.jpg", "list.txt"):
        os.utime(tmp_path / name, (1, 1))
        seen.add(make_source(tmp_path, ["1.jpg"], []).fingerprint)
    assert len(seen) == 4


def test_facts_of_missing_files_are_negative(tmp_path: Path) -> None:
    write_named_files(tmp_path, "a/1.jpg", "a/2.txt")
    facts = find_facts(tmp_path, [b"a/2.txt", b"a/1.jpg", b"b/3.jpg"])
    assert [fact[0] for fact in facts] == [b"a/2.txt", b"a/1.jpg", b"b/3.jpg"]
    assert [fact[1] for fact in facts] == [-1, len("a/1.jpg"), -1]


def test_image_files_are_listed_without_subfolders(tmp_path: Path) -> None:
    write_named_files(tmp_path / "root", "a/2.jpg", "a/1.JPEG", "a/.3.jpg", "a/x.txt", "a/b/4.jpg")
    assert list_image_files(tmp_path / "root", "a") == ["a/1.JPEG", "a/2.jpg"]
    assert list_image_files(tmp_path / "root", "none") == []
    os.symlink(tmp_path, tmp_path / "root" / "out")
    with pytest.raises(UserError, match=r"out' is a link that leaves the root"):
        list_image_files(tmp_path / "root", "out")

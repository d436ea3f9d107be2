"""Layouts of folders: what is a split, what a class, what only wraps others, and what nobody can tell."""

from collections import Counter

import pytest

from firstlight.pipeline.data.sources.conventions.folder_layout import (
    FolderPlan,
    build_folder_tree,
    find_layout,
    plan_given_splits,
)
from firstlight.pipeline.errors import UserError


def show(name: bytes) -> str:
    return name.decode()


def plan(*paths: str) -> FolderPlan:
    return find_layout(build_folder_tree(Counter(path.rpartition("/")[0].encode() for path in paths)), show)


def place(*paths: str) -> dict[str, tuple[str | None, str]]:
    """Returns the split and the class of each path."""
    found = plan(*paths)
    placed = {path: found.place_folder(path.rpartition("/")[0].encode()) for path in paths}
    return {path: (split, kind.decode()) for path, (split, kind) in placed.items()}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("train2017", "val2017", "test2017"),
        ("training_set", "dev_set", "test_set"),
        ("images/train", "images/val", "images/test"),
        ("seg_train/seg_train", "seg_val/seg_val", "seg_test/seg_test"),
        ("mydata/data/train", "mydata/data/validation", "mydata/data/testing"),
        ("train/images", "valid/images", "test/images"),
    ],
)
@pytest.mark.parametrize("kind", ["cat", ""])
def test_splits_are_found_by_name(train: str, val: str, test: str, kind: str) -> None:
    below, other = (f"/{kind}" if kind else ""), ("/dog" if kind else "")
    paths = [f"{train}{below}/1", f"{train}{other}/2", f"{val}{below}/3", f"{test}{below}/4"]
    found = place(*paths)
    assert [found[path] for path in paths] == [
        ("train", kind),
        ("train", "dog" if kind else ""),
        ("val", kind),
        ("test", kind),
    ]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("mydata/cat/1", "mydata/dog/2"), {"mydata/cat/1": ("train", "cat"), "mydata/dog/2": ("train", "dog")}),
        (("photos/1", "photos/2"), {"photos/1": ("train", ""), "photos/2": ("train", "")}),
        (("cat/1",), {"cat/1": ("train", "cat")}),
        (("1", "2"), {"1": ("train", ""), "2": ("train", "")}),
        (("cat/a/1", "dog/b/2"), {"cat/a/1": ("train", "cat"), "dog/b/2": ("train", "dog")}),
        (("train/1",), {"train/1": ("train", "")}),
        (("test/cat/1", "test/dog/2"), {"test/cat/1": ("train", "cat"), "test/dog/2": ("train", "dog")}),
        (("1", "test/2"), {"1": ("train", ""), "test/2": ("test", "")}),
        (("images/1", "masks/2"), {"images/1": ("train", ""), "masks/2": (None, "")}),
        (
            ("train/images/1", "train/masks/1", "val/images/1"),
            {"train/images/1": ("train", ""), "train/masks/1": (None, "")},
        ),
        (
            ("images/train/1", "masks/train/1", "images/val/1", "masks/val/1"),
            {"images/train/1": ("train", ""), "masks/train/1": (None, ""), "images/val/1": ("val", "")},
        ),
        (
            ("cat/train/1", "cat/test/2", "dog/train/3", "dog/test/4"),
            {"cat/train/1": ("train", "cat"), "cat/test/2": ("test", "cat"), "dog/test/4": ("test", "dog")},
        ),
        (
            ("cat/1", "dog/2", "test/cat/3", "test/dog/4"),
            {"cat/1": ("train", "cat"), "dog/2": ("train", "dog"), "test/cat/3": ("test", "cat")},
        ),
        (
            ("train/cat/1", "train/dog/2", "extra/3"),
            {"train/cat/1": ("train", "cat"), "train/dog/2": ("train", "dog"), "extra/3": (None, "")},
        ),
        (
            ("airplane/1", "bus/2", "train/3"),
            {"airplane/1": ("train", "airplane"), "bus/2": ("train", "bus"), "train/3": ("train", "train")},
        ),
        (("crash_test/1", "crash_site/2"), {"crash_test/1": ("train", "crash_test")}),
        (("crash_test/1", "stress_test/2"), {"crash_test/1": ("train", "crash_test")}),
        (("freight_train/1", "tram/2"), {"freight_train/1": ("train", "freight_train")}),
    ],
)
def test_layouts_whose_meaning_is_certain(paths: tuple[str, ...], expected: dict[str, tuple[str | None, str]]) -> None:
    found = place(*paths)
    assert {path: found[path] for path in expected} == expected


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("train/1", "extra/2"), r"the folder 'train' stands beside extra: the training split, or a class\? valid: "),
        (("train/cat/1", "extra/cat/2"), r"the folder 'train' stands beside extra: the training split, or a class\?"),
        (
            ("cat/1", "dog/2", "test/3"),
            r"'test' stands beside cat, dog: a split, or a class\? valid: dataset\.splits={train: '\*', test: test}",
        ),
        (
            ("val/cat/1", "test/2"),
            r"folders test, val, and none to train on; valid: a folder train, or dataset\.splits=",
        ),
        (
            ("train2014/1", "train2017/2", "val2017/3"),
            r"'train2014', 'train2017' in the root all name the training split",
        ),
        (
            ("train_1/1", "train_2/2"),
            r"train_1, train_2: parts of splits, or classes\? valid: dataset\.splits={train: \[train_1",
        ),
        (
            ("trainA/1", "trainB/2", "testA/3", "testB/4"),
            r"'trainA', 'trainB' in the root all name the training split",
        ),
        (
            ("cat/train/1", "cat/test/2", "dog/3"),
            r"'cat' holds test, train: splits, or parts of a class\? valid: dataset\.splits=",
        ),
    ],
)
def test_ambiguous_folders_raise_an_error_with_the_valid_choices(paths: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(*paths)
    assert "dataset.splits={" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_decisions_are_reported() -> None:
    assert plan("Train/cat/1", "Test/cat/2").reading == ["splits: training = Train; test = Test"]
    assert plan("mydata/cat/1", "mydata/dog/1").reading == [
        "the images of the root are all in mydata, which is looked through"
    ]
    assert "train is read as a class" in plan("bus/1", "car/2", "train/3").notes[0]
    assert "left out, as it stands beside images: masks (1 image)" in plan("images/1", "masks/2").notes[0]
    assert plan("test/1").notes == ["all images are in test, so they are trained on"]


def given(splits: dict[str, list[str]], *paths: str) -> FolderPlan:
    tree = build_folder_tree(Counter(path.rpartition("/")[0].encode() for path in paths))
    return plan_given_splits(tree, splits, str.encode, show)


def test_given_splits_count_as_they_are() -> None:
    paths = ("a/cat/1", "b/cat/2", "c/cat/3", "cat/x/4")
    found = given({"train": ["a", "b"], "test": ["c"]}, *paths)
    assert [found.place_folder(path.rpartition("/")[0].encode()) for path in paths] == [
        ("train", b"cat"),
        ("train", b"cat"),
        ("test", b"cat"),
        (None, b""),
    ]
    assert [found.name_outsider(path.encode()) for path in ("cat/x/4", "z.jpg")] == [b"cat", b"z.jpg"]
    assert given({"train": ["*/x"], "val": ["cat/x/deep"]}, "cat/x/4", "cat/x/deep/5").place_folder(b"cat/x/deep") == (
        "val",
        b"",
    )
    assert given({}, "train/1", "test/2").place_folder(b"train") == ("train", b"train")
    with pytest.raises(UserError, match=r"dataset\.splits\.test: no images in 'd'; folders with images: a, b, c, cat"):
        given({"train": ["a"], "test": ["d"]}, *paths)
    with pytest.raises(UserError, match=r"dataset\.splits: names no folder to train on"):
        given({"test": ["a"]}, *paths)

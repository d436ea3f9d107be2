"""Stanford Dogs: lists in MATLAB files, labels from 1."""

from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.support.image_sources import list_labels, read_split
from tests.support.layouts import dogs_list
from tests.support.published_sets import get_refusal, open_set, write_jpegs

PUG, BASENJI = "n02110958-pug", "n02110806-basenji"
TRAIN = ((f"{PUG}/n02110958_9.jpg", 2), (f"{BASENJI}/n02110806_1.jpg", 1), (f"{PUG}/n02110958_2.jpg", 2))
TEST = ((f"{PUG}/n02110958_5.jpg", 2),)


def write_dogs(
    root: Path,
    train: tuple[tuple[str, int], ...] = TRAIN,
    test: tuple[tuple[str, int], ...] = TEST,
    below: str = "lists",
) -> Path:
    write_jpegs(root / "Images", *(name for name, _ in TRAIN + TEST))
    for name, rows in (("train_list", train), ("test_list", test)):
        dogs_list(root / below / f"{name}.mat", rows)
    return root


def test_lists_define_classes_and_splits(tmp_path: Path) -> None:
    source = open_set("stanford_dogs", write_dogs(tmp_path))
    assert (source.classes, source.splits) == ((BASENJI, PUG), {"train": 3, "test": 1})
    assert list_labels(source) == [(f"Images/{path}", label - 1) for path, label in TRAIN]
    assert list_labels(source, "test") == [(f"Images/{path}", label - 1) for path, label in TEST]
    assert [record.data for record in read_split(source)] == [
        (tmp_path / "Images" / path).read_bytes() for path, _ in TRAIN
    ]


def test_lists_may_be_in_root(tmp_path: Path) -> None:
    assert open_set("stanford_dogs", write_dogs(tmp_path, below=".")).splits == {"train": 3, "test": 1}


def test_missing_image_has_reason(tmp_path: Path) -> None:
    source = open_set("stanford_dogs", write_dogs(tmp_path, test=(*TEST, (f"{PUG}/none.jpg", 2))))
    assert [record.reason for record in read_split(source, "test")] == [None, "No such file or directory"]


def test_invalid_lists_raise(tmp_path: Path) -> None:
    train, test = tmp_path / "lists" / "train_list.mat", tmp_path / "lists" / "test_list.mat"
    for row, message in (
        ((f"{PUG}/x.jpg", 3), f"label 3 of '{PUG}/x.jpg' is out of range; valid: 1 to 2"),
        ((f"{PUG}/x.jpg", 1), f"label 1 of '{PUG}/x.jpg' stands for '{BASENJI}'"),
        (("../x.jpg", 1), "'../x.jpg' is no path below dataset.root"),
    ):
        assert get_refusal("stanford_dogs", write_dogs(tmp_path, test=(*TEST, row))) == f"{test}: row 1: {message}"
    message = get_refusal("stanford_dogs", write_dogs(tmp_path, train=((f"{PUG}/a.jpg", 1), (f"{BASENJI}/b.jpg", 3))))
    assert message == f"{train}: no image has label 2, yet one has label 3; valid: 1 to the number of classes"
    train.write_bytes(b"x" * 500)
    assert get_refusal("stanford_dogs", tmp_path).startswith(f"{train}: cannot be read as a MATLAB file")
    savemat(train, {"other": np.zeros(3)})
    assert (
        get_refusal("stanford_dogs", tmp_path)
        == f"{train}: has no variable 'file_list', but other; the file may be cut short"
    )
    savemat(train, {"file_list": np.array([["a"]], object), "labels": np.array([[1.5]])})
    assert get_refusal("stanford_dogs", tmp_path) == f"{train}: the variable 'labels' must hold whole numbers"
    train.unlink()
    assert get_refusal("stanford_dogs", tmp_path).startswith(f"dataset.root: {str(train)!r} is missing; ")

"""Stanford Dogs: lists in MATLAB files, labels from 1."""

from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.support.layouts import dogs_list
from tests.support.published import jpegs, opened, refusal
from tests.support.tiny import everything, summary

PUG, BASENJI = "n02110958-pug", "n02110806-basenji"
TRAIN = ((f"{PUG}/n02110958_9.jpg", 2), (f"{BASENJI}/n02110806_1.jpg", 1), (f"{PUG}/n02110958_2.jpg", 2))
TEST = ((f"{PUG}/n02110958_5.jpg", 2),)


def dogs(
    root: Path,
    train: tuple[tuple[str, int], ...] = TRAIN,
    test: tuple[tuple[str, int], ...] = TEST,
    below: str = "lists",
) -> Path:
    jpegs(root / "Images", *(name for name, _ in TRAIN + TEST))
    for name, rows in (("train_list", train), ("test_list", test)):
        dogs_list(root / below / f"{name}.mat", rows)
    return root


def test_dogs(tmp_path: Path) -> None:
    source = opened("stanford_dogs", dogs(tmp_path))
    assert (source.classes, source.splits) == ((BASENJI, PUG), {"train": 3, "test": 1})
    assert summary(source) == [(f"Images/{path}", label - 1) for path, label in TRAIN]
    assert summary(source, "test") == [(f"Images/{path}", label - 1) for path, label in TEST]
    assert [record.data for record in everything(source)] == [
        (tmp_path / "Images" / path).read_bytes() for path, _ in TRAIN
    ]


def test_lists_beside_the_images(tmp_path: Path) -> None:
    assert opened("stanford_dogs", dogs(tmp_path, below=".")).splits == {"train": 3, "test": 1}


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    source = opened("stanford_dogs", dogs(tmp_path, test=(*TEST, (f"{PUG}/none.jpg", 2))))
    assert [record.reason for record in everything(source, "test")] == [None, "No such file or directory"]


def test_what_is_refused(tmp_path: Path) -> None:
    train, test = tmp_path / "lists" / "train_list.mat", tmp_path / "lists" / "test_list.mat"
    for row, told in (
        ((f"{PUG}/x.jpg", 3), f"label 3 of '{PUG}/x.jpg' is out of range; valid: 1 to 2"),
        ((f"{PUG}/x.jpg", 1), f"label 1 of '{PUG}/x.jpg' stands for '{BASENJI}'"),
        (("../x.jpg", 1), "'../x.jpg' is no path below dataset.root"),
    ):
        assert refusal("stanford_dogs", dogs(tmp_path, test=(*TEST, row))) == f"{test}: row 1: {told}"
    told = refusal("stanford_dogs", dogs(tmp_path, train=((f"{PUG}/a.jpg", 1), (f"{BASENJI}/b.jpg", 3))))
    assert told == f"{train}: no image has label 2, yet one has label 3; valid: 1 to the number of classes"
    train.write_bytes(b"x" * 500)
    assert refusal("stanford_dogs", tmp_path).startswith(f"{train}: cannot be read as a MATLAB file")
    savemat(train, {"other": np.zeros(3)})
    assert (
        refusal("stanford_dogs", tmp_path)
        == f"{train}: has no variable 'file_list', but other; the file may be cut short"
    )
    savemat(train, {"file_list": np.array([["a"]], object), "labels": np.array([[1.5]])})
    assert refusal("stanford_dogs", tmp_path) == f"{train}: the variable 'labels' must hold whole numbers"
    train.unlink()
    assert refusal("stanford_dogs", tmp_path).startswith(f"dataset.root: {str(train)!r} is missing; ")

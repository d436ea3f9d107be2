"""SVHN's MATLAB files: images in the last dimension, and 10 for the digit 0."""

from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.support.layouts import svhn_file
from tests.support.published import noise, opened, pixels, refusal
from tests.support.tiny import everything, summary


def svhn(root: Path, labels: tuple[list[int], list[int]] = ([1, 10, 9], [10, 2]), compress: bool = True) -> np.ndarray:
    """Three images to train on, two to test on; (5, 32, 32, 3)."""
    images = noise(4, 5, 32, 32, 3)
    for name, part, digits in (("train", slice(0, 3), labels[0]), ("test", slice(3, 5), labels[1])):
        svhn_file(root, name, images[part], digits, compress)
    return images


def test_svhn(tmp_path: Path) -> None:
    images = svhn(tmp_path)
    source = opened("svhn", tmp_path)
    assert (source.classes, source.splits) == (tuple("0123456789"), {"train": 3, "test": 2})
    np.testing.assert_array_equal(pixels(source), images[:3])
    np.testing.assert_array_equal(pixels(source, "test"), images[3:])
    assert summary(source) == [("train_32x32.mat#0", 1), ("train_32x32.mat#1", 0), ("train_32x32.mat#2", 9)]
    assert [label for _, label in summary(source, "test")] == [0, 2]
    assert [record for part in source.parts(2) for record in source.read(part)] == everything(source) + everything(
        source, "test"
    )


def test_damage_while_reading(tmp_path: Path) -> None:
    svhn(tmp_path)
    source = opened("svhn", tmp_path)
    file = tmp_path / "train_32x32.mat"
    data = bytearray(file.read_bytes())
    data[2000:2100] = bytes(100)
    file.write_bytes(bytes(data))
    reasons = [record.reason or "" for record in everything(source)]
    assert all(reason.startswith("train_32x32.mat cannot be read: ") for reason in reasons)
    assert [record.label for record in everything(source)] == [1, 0, 9]
    assert all(record.data for record in everything(source, "test"))
    savemat(file, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((2, 1))})
    told = "train_32x32.mat cannot be read: it changed: its images are now uint8 of shape (32, 32, 3, 2)"
    assert [record.reason for record in everything(source)] == [told] * 3


def test_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train_32x32.mat"
    assert refusal("svhn", tmp_path) == f"dataset.root: {str(file)!r} is missing; {str(tmp_path)!r} holds nothing"
    for labels, told in (
        ([1, 0, 3], "row 1: label 0 is out of range; valid: 1 to 10"),
        ([1, 2, 11], "row 2: label 11 is out of range; valid: 1 to 10"),
        ([1, 2], "has 2 labels in y for 3 images in X"),
    ):
        svhn(tmp_path, (labels, [1, 2]))
        assert refusal("svhn", tmp_path) == f"{file}: {told}"
    svhn(tmp_path, compress=False)
    file.write_bytes(file.read_bytes()[:5000])
    assert refusal("svhn", tmp_path).startswith(f"{file}: ")
    file.write_bytes(b"not a MATLAB file" * 20)
    assert refusal("svhn", tmp_path).startswith(f"{file}: cannot be read as a MATLAB file up to version 7: ")
    savemat(file, {"X": np.zeros((4, 4, 3, 2)), "y": np.ones((2, 1))})
    assert (
        refusal("svhn", tmp_path)
        == f"{file}: the variable X is double of shape (4, 4, 3, 2); valid: uint8 of shape (32, 32, 3, n)"
    )

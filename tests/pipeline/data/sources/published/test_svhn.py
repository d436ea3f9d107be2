"""The MATLAB files of SVHN: images in the last dimension, and 10 for the digit 0."""

from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.support.image_sources import list_labels, read_split
from tests.support.layouts import svhn_file
from tests.support.published_sets import decode_split, get_refusal, noise, open_set


def write_svhn(
    root: Path, labels: tuple[list[int], list[int]] = ([1, 10, 9], [10, 2]), compress: bool = True
) -> np.ndarray:
    """Three images to train on, two to test on; (5, 32, 32, 3)."""
    images = noise(4, 5, 32, 32, 3)
    for name, part, digits in (("train", slice(0, 3), labels[0]), ("test", slice(3, 5), labels[1])):
        svhn_file(root, name, images[part], digits, compress)
    return images


def test_pixels_and_labels_are_read(tmp_path: Path) -> None:
    images = write_svhn(tmp_path)
    source = open_set("svhn", tmp_path)
    assert (source.classes, source.splits) == (tuple("0123456789"), {"train": 3, "test": 2})
    np.testing.assert_array_equal(decode_split(source), images[:3])
    np.testing.assert_array_equal(decode_split(source, "test"), images[3:])
    assert list_labels(source) == [("train_32x32.mat#0", 1), ("train_32x32.mat#1", 0), ("train_32x32.mat#2", 9)]
    assert [label for _, label in list_labels(source, "test")] == [0, 2]
    assert [record for part in source.split_into_parts(2) for record in source.read(part)] == read_split(
        source
    ) + read_split(source, "test")


def test_file_damaged_after_listing_has_reasons(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    source = open_set("svhn", tmp_path)
    file = tmp_path / "train_32x32.mat"
    data = bytearray(file.read_bytes())
    data[2000:2100] = bytes(100)
    file.write_bytes(bytes(data))
    reasons = [record.reason or "" for record in read_split(source)]
    assert all(reason.startswith("train_32x32.mat cannot be read: ") for reason in reasons)
    assert [record.label for record in read_split(source)] == [1, 0, 9]
    assert all(record.data for record in read_split(source, "test"))
    savemat(file, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((2, 1))})
    message = "train_32x32.mat cannot be read: it changed: its images are now uint8 of shape (32, 32, 3, 2)"
    assert [record.reason for record in read_split(source)] == [message] * 3


def test_invalid_files_raise(tmp_path: Path) -> None:
    file = tmp_path / "train_32x32.mat"
    assert get_refusal("svhn", tmp_path) == f"dataset.root: {str(file)!r} is missing; {str(tmp_path)!r} holds nothing"
    for labels, message in (
        ([1, 0, 3], "row 1: label 0 is out of range; valid: 1 to 10"),
        ([1, 2, 11], "row 2: label 11 is out of range; valid: 1 to 10"),
        ([1, 2], "has 2 labels in y for 3 images in X"),
    ):
        write_svhn(tmp_path, (labels, [1, 2]))
        assert get_refusal("svhn", tmp_path) == f"{file}: {message}"
    write_svhn(tmp_path, compress=False)
    file.write_bytes(file.read_bytes()[:5000])
    assert get_refusal("svhn", tmp_path).startswith(f"{file}: ")
    file.write_bytes(b"not a MATLAB file" * 20)
    assert get_refusal("svhn", tmp_path).startswith(f"{file}: cannot be read as a MATLAB file up to version 7: ")
    savemat(file, {"X": np.zeros((4, 4, 3, 2)), "y": np.ones((2, 1))})
    assert (
        get_refusal("svhn", tmp_path)
        == f"{file}: the variable X is double of shape (4, 4, 3, 2); valid: uint8 of shape (32, 32, 3, n)"
    )

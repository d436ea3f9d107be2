"""IDX files, plain and gzipped."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.image_sources import list_labels, read_split
from tests.support.layouts import idx_file
from tests.support.published_sets import decode_split, get_refusal, noise, open_set


def write_mnist(root: Path, zipped: bool = False) -> np.ndarray:
    """Four images of 5 x 7 to train on, two to test on; (6, 5, 7)."""
    images = noise(3, 6, 5, 7)
    for split, part, labels in (("train", slice(0, 4), [2, 0, 1, 1]), ("t10k", slice(4, 6), [1, 0])):
        idx_file(root, f"{split}-images-idx3-ubyte", images[part], zipped)
        idx_file(root, f"{split}-labels-idx1-ubyte", np.array(labels), zipped)
    return images


@pytest.mark.parametrize("zipped", [False, True])
def test_pixels_and_labels_are_read(tmp_path: Path, zipped: bool) -> None:
    images = write_mnist(tmp_path, zipped)
    source = open_set("idx", tmp_path)
    assert (source.classes, source.splits) == (("0", "1", "2"), {"train": 4, "test": 2})
    np.testing.assert_array_equal(decode_split(source)[..., 0], images[:4])
    np.testing.assert_array_equal(decode_split(source, "test"), np.repeat(images[4:, :, :, None], 3, axis=3))
    suffix = ".gz" if zipped else ""
    assert [label for _, label in list_labels(source)] == [2, 0, 1, 1]
    assert list_labels(source, "test") == [
        (f"t10k-images-idx3-ubyte{suffix}#0", 1),
        (f"t10k-images-idx3-ubyte{suffix}#1", 0),
    ]


def test_rows_after_end_of_cut_file_have_reasons(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-36])
    records = read_split(open_set("idx", tmp_path))
    assert [record.reason for record in records] == [
        None,
        None,
        *(f"train-images-idx3-ubyte ends before row {k} does" for k in (2, 3)),
    ]


def test_damaged_gzip_has_reasons(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-60])
    records = read_split(open_set("idx", tmp_path))
    assert {record.label for record in records} == {0, 1, 2}
    assert (records[-1].reason or "").startswith("train-images-idx3-ubyte.gz cannot be read: ")
    file.write_bytes(b"no gzip at all")
    assert get_refusal("idx", tmp_path).startswith(f"{file}: cannot be read: Not a gzipped file")


def test_invalid_files_raise(tmp_path: Path) -> None:
    assert "'train-images-idx3-ubyte" not in get_refusal("idx", tmp_path)  # the full path is message
    assert get_refusal("idx", tmp_path).endswith(
        "train-images-idx3-ubyte' is missing; " + f"{str(tmp_path)!r} holds nothing"
    )
    write_mnist(tmp_path)
    labels, images = tmp_path / "train-labels-idx1-ubyte", tmp_path / "t10k-images-idx3-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(good[:-1])
    assert get_refusal("idx", tmp_path) == f"{labels}: holds 3 of the 4 labels that its header states"
    idx_file(tmp_path, labels.name, np.array([1, 2, 3]))
    assert (
        get_refusal("idx", tmp_path)
        == f"{labels}: has 3 labels for the 4 images of 5 x 7 pixels of train-images-idx3-ubyte"
    )
    labels.write_bytes(b"\x00\x00\x0d\x01" + good[4:])
    assert (
        get_refusal("idx", tmp_path) == f"{labels}: is no IDX file of bytes in 1 dimensions: it starts with 00 00 0d 01"
    )
    labels.write_bytes(good)
    assert get_refusal("idx", tmp_path, max_pixels=34).endswith(
        "has images of 5 x 7 pixels; valid: at most 34 in all (dataset.max_pixels)"
    )
    idx_file(tmp_path, "t10k-labels-idx1-ubyte", np.array([1, 3]))
    assert (
        get_refusal("idx", tmp_path)
        == f"{tmp_path / 't10k-labels-idx1-ubyte'}: row 1: label 3 is out of range; valid: 0 to 2"
    )
    whole = images.read_bytes()
    images.write_bytes(whole + b"x")
    assert (
        get_refusal("idx", tmp_path) == f"{images}: is larger than the 2 images of 5 x 7 pixels that its header states"
    )
    idx_file(tmp_path, images.name, noise(0, 2, 7, 7))
    assert (
        get_refusal("idx", tmp_path)
        == f"{images}: has images of 7 x 7 pixels; valid: 5 x 7, as in train-images-idx3-ubyte"
    )

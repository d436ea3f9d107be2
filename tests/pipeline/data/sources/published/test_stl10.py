"""STL-10: images stored column after column, labels from 1, and images without labels."""

from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources.published.stl10 import read_folds
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, list_labels, read_split
from tests.support.layouts import stl10_rows
from tests.support.published_sets import decode_split, get_refusal, noise, open_set

NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@pytest.fixture
def stl(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Four labelled, three unlabelled, two to test on; (9, 96, 96, 3)."""
    images, folder = noise(2, 9, 96, 96, 3), tmp_path / "stl10_binary"
    folder.mkdir()
    for name, part in (("train_X", slice(0, 4)), ("unlabeled_X", slice(4, 7)), ("test_X", slice(7, 9))):
        (folder / f"{name}.bin").write_bytes(stl10_rows(images[part]))
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 3, 1]))
    (folder / "test_y.bin").write_bytes(bytes([2, 10]))
    (folder / "class_names.txt").write_text("\n".join(NAMES))
    (folder / "fold_indices.txt").write_text("0 3 \n1 2 \n")
    return tmp_path, images


def test_pixels_labels_and_splits_are_read(stl: tuple[Path, np.ndarray]) -> None:
    source = open_set("stl10", stl[0])
    assert (source.classes, source.splits) == (NAMES, {"train": 7, "test": 2})
    np.testing.assert_array_equal(decode_split(source), stl[1][:7])
    np.testing.assert_array_equal(decode_split(source, "test"), stl[1][7:])
    assert [label for _, label in list_labels(source)] == [0, 9, 2, 0, -1, -1, -1]
    assert list_labels(source, "test") == [("test_X.bin#0", 1), ("test_X.bin#1", 9)]
    assert [path for path, _ in list_labels(source)][3:5] == ["train_X.bin#3", "unlabeled_X.bin#0"]
    assert open_set("stl10", stl[0] / "stl10_binary").fingerprint == source.fingerprint


def test_folds_index_the_listing(stl: tuple[Path, np.ndarray]) -> None:
    source = open_set("stl10", stl[0])
    for root in (stl[0], stl[0] / "stl10_binary"):
        assert [fold.tolist() for fold in read_folds(root)] == [[0, 3], [1, 2]]
    assert [source.labels[fold].tolist() for fold in read_folds(stl[0])] == [[0, 0], [9, 2]]
    file = stl[0] / "stl10_binary" / "fold_indices.txt"
    file.write_text("0 3\n1 4\n")
    with pytest.raises(UserError, match=r"fold_indices\.txt: line 2: '4' is no labelled training image; valid: 0 to 3"):
        read_folds(stl[0])


def test_rows_after_end_of_cut_file_have_reasons(stl: tuple[Path, np.ndarray]) -> None:
    folder = stl[0] / "stl10_binary"
    for name in ("unlabeled_X.bin", "train_X.bin"):
        (folder / name).write_bytes((folder / name).read_bytes()[: 2 * 27648 + 100])
    found = {record.path: record.reason for record in read_split(open_set("stl10", stl[0]))}
    assert {
        path: reason for path, reason in found.items() if reason
    } == {  # train_y has four labels, so all missing images are named
        "train_X.bin#2": "train_X.bin ends before row 2 does",
        "train_X.bin#3": "train_X.bin ends before row 3 does",
        "unlabeled_X.bin#2": "unlabeled_X.bin ends before row 2 does",
    }


def test_invalid_labels_and_missing_files_raise(stl: tuple[Path, np.ndarray]) -> None:
    folder = stl[0] / "stl10_binary"
    for labels, message in (
        ([1, 0, 3, 1], "row 1: label 0 is out of range; valid: 1 to 10"),
        ([1, 2, 3, 11], "row 3: label 11 is out of range; valid: 1 to 10"),
        ([1, 2, 3], "has 3 labels for the 4 images of train_X.bin"),
    ):
        (folder / "train_y.bin").write_bytes(bytes(labels))
        assert get_refusal("stl10", stl[0]) == f"{folder / 'train_y.bin'}: {message}"
    (folder / "unlabeled_X.bin").unlink()
    assert get_refusal("stl10", stl[0]).startswith(f"dataset.root: {str(folder / 'unlabeled_X.bin')!r} is missing; ")


def test_labelled_and_unlabelled_images_are_stored(stl: tuple[Path, np.ndarray]) -> None:
    """Labelled and unlabelled images in one store."""
    store = prepare(
        dataset_options(source="stl10", root=stl[0]), stl[0] / "stores", lambda: False, lambda done, total: None
    )
    assert (store.classes, store.labels("train").tolist(), store.labels("test").tolist()) == (
        NAMES,
        [0, 9, 2, 0, -1, -1, -1],
        [1, 9],
    )
    assert {name: store.subset(name).tolist() for name in store.subsets["images"]} == {"fold0": [0, 3], "fold1": [1, 2]}


def test_folds_are_optional(stl: tuple[Path, np.ndarray]) -> None:
    before = open_set("stl10", stl[0])
    (stl[0] / "stl10_binary" / "fold_indices.txt").unlink()
    after = open_set("stl10", stl[0])
    assert (sorted(before.subsets), after.subsets) == (["fold0", "fold1"], {})
    assert before.fingerprint != after.fingerprint


def test_fold_omits_unreadable_images(stl: tuple[Path, np.ndarray]) -> None:
    file = stl[0] / "stl10_binary" / "train_X.bin"
    file.write_bytes(file.read_bytes()[: 3 * 27648])  # the fourth is removed, so that later images have other ids
    store = prepare(
        dataset_options(source="stl10", root=stl[0], max_bad_fraction=0.5),
        stl[0] / "stores",
        lambda: False,
        lambda done, total: None,
    )
    assert [store.subset(f"fold{k}").tolist() for k in range(2)] == [[0], [1, 2]]
    assert store.subsets["lost"] == {"fold0": 1, "fold1": 0}

"""ImageNet: training folders of WordNet ids, and validation images with the development kit or in folders."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from tests.support import layouts
from tests.support.image_sources import list_labels, read_split
from tests.support.published_sets import get_refusal, open_set, write_jpegs

TRAIN = ("train/n02/n02_7.JPEG", "train/n01/n01_10.JPEG", "train/n01/n01_9.JPEG", "train/n03/n03_1.JPEG")
VAL = tuple(f"val/ILSVRC2012_val_{k:08d}.JPEG" for k in (1, 2, 3))
KIT = "ILSVRC2012_devkit_t12/data"


def write_devkit(folder: Path, truth: str) -> None:
    """Ids that are not in the order of the WordNet ids, and an inner node of the tree, as in the real file."""
    layouts.devkit(
        folder, [(1, "n02", "two", 0), (2, "n03", "three", 0), (3, "n01", "one", 0), (4, "n00", "all", 3)], truth
    )


@pytest.mark.parametrize("kit", [KIT, "data", "."])
def test_flat_val_is_labelled_by_devkit(tmp_path: Path, kit: str) -> None:
    write_devkit(write_jpegs(tmp_path, *TRAIN, *VAL) / kit, "3\n1\n2\n")
    source = open_set("imagenet", tmp_path)
    assert (source.classes, source.splits) == (("n01", "n02", "n03"), {"train": 4, "test": 3})
    assert list_labels(source) == [(TRAIN[1], 0), (TRAIN[2], 0), (TRAIN[0], 1), (TRAIN[3], 2)]
    assert list_labels(source, "test") == [(VAL[0], 0), (VAL[1], 1), (VAL[2], 2)]
    assert [record.data for record in read_split(source, "test")] == [(tmp_path / name).read_bytes() for name in VAL]


def test_val_folders_are_labelled_by_name(tmp_path: Path) -> None:
    write_jpegs(tmp_path, *TRAIN, "val/n03/b.JPEG", "val/n01/a.JPEG")
    assert list_labels(open_set("imagenet", tmp_path), "test") == [("val/n01/a.JPEG", 0), ("val/n03/b.JPEG", 2)]


def test_missing_image_has_reason(tmp_path: Path) -> None:
    write_devkit(write_jpegs(tmp_path, *TRAIN, VAL[0], VAL[2]) / KIT, "3\n1\n2\n")
    records = read_split(open_set("imagenet", tmp_path), "test")
    assert [record.label for record in records] == [0, 1, 2]
    assert [record.reason for record in records] == [None, "No such file or directory", None]


def test_links_are_read_only_within_root(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "root", *TRAIN, "val/n01/a.JPEG")
    write_jpegs(tmp_path / "outside", "secret.JPEG")
    os.symlink(tmp_path / "outside" / "secret.JPEG", tmp_path / "root" / "train" / "n01" / "z.JPEG")
    reasons = {record.path: record.reason for record in read_split(open_set("imagenet", tmp_path / "root"))}
    assert {path for path, reason in reasons.items() if reason} == {"train/n01/z.JPEG"}
    assert reasons["train/n01/z.JPEG"] == "link leaves the root"
    os.symlink(tmp_path / "outside", tmp_path / "root" / "train" / "n02" / "more")
    shutil.rmtree(tmp_path / "root" / "train" / "n03")
    os.symlink(tmp_path / "outside", tmp_path / "root" / "train" / "n03")
    assert "train/n03' is a link that leaves the root" in get_refusal("imagenet", tmp_path / "root")


def test_invalid_layouts_raise(tmp_path: Path) -> None:
    truth = tmp_path / KIT / "ILSVRC2012_validation_ground_truth.txt"
    write_jpegs(tmp_path, *TRAIN)
    assert (
        get_refusal("imagenet", tmp_path)
        == f"dataset.root: {str(tmp_path / 'val')!r} is missing; {str(tmp_path)!r} holds 'train'"
    )
    write_jpegs(tmp_path, *VAL)
    assert "ILSVRC2012_devkit_t12/data' is missing" in get_refusal("imagenet", tmp_path)
    for content, message in (
        ("3\n1\n5\n", "line 3: label 5: out of range; valid: an ILSVRC2012_ID of meta.mat, 1 to 3"),
        ("3\n4\n2\n", "line 2: label 4: out of range; valid: an ILSVRC2012_ID of meta.mat, 1 to 3"),
        ("3\nx\n2\n", "line 2: label x: out of range; valid: an ILSVRC2012_ID of meta.mat, 1 to 3"),
    ):
        write_devkit(tmp_path / KIT, content)
        assert get_refusal("imagenet", tmp_path) == f"{truth}: {message}"
    truth.write_text("3\n1\n")
    assert get_refusal("imagenet", tmp_path) == f"dataset.root: {VAL[2]} is none of the 2 images of {truth}"
    truth.write_text("3\n1\n2\n")
    shutil.rmtree(tmp_path / "train" / "n02")
    assert get_refusal("imagenet", tmp_path) == f"{truth}: line 2: label 1: the training split has no class 'n02'"
    (tmp_path / "train" / "n02").mkdir()
    assert get_refusal("imagenet", tmp_path) == f"dataset.root: no images in {str(tmp_path / 'train' / 'n02')!r}"
    write_jpegs(tmp_path, "train/beside.JPEG")
    assert get_refusal("imagenet", tmp_path).startswith("dataset.root: train/beside.JPEG is outside of the folders")
    shutil.rmtree(tmp_path / "train")
    write_jpegs(tmp_path, *TRAIN)
    meta = tmp_path / KIT / "meta.mat"
    savemat(meta, {"synsets": np.zeros(3)})
    assert get_refusal("imagenet", tmp_path) == f"{meta}: the variable 'synsets' has no field 'ILSVRC2012_ID'"
    meta.unlink()
    assert "meta.mat' is missing" in get_refusal("imagenet", tmp_path)

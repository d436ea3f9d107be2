"""A folder of images: classes, splits, links, names, and what is refused."""

import os
import pickle
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import Record
from firstlight.pipeline.data.sources.files import MAX_IMAGE_BYTES
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import list_labels, open_folder_set, read_split, write_named_files


def test_subfolders_are_classes(tmp_path: Path) -> None:
    source = open_folder_set(
        write_named_files(
            tmp_path, "dog/b.PNG", "cat/z/a.jpg", "cat/B.jpeg", "dog/notes.txt", ".hidden/x.jpg", "cat/.x.jpg"
        )
    )
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 3})
    assert list_labels(source) == [("cat/B.jpeg", 0), ("cat/z/a.jpg", 0), ("dog/b.PNG", 1)]
    assert [record.data for record in read_split(source)] == [b"cat/B.jpeg", b"cat/z/a.jpg", b"dog/b.PNG"]


def test_image_outside_subfolders_makes_set_unlabelled(tmp_path: Path) -> None:
    source = open_folder_set(write_named_files(tmp_path, "a.jpg", "cat/b.jpg"))
    assert (source.classes, list_labels(source)) == ((), [("a.jpg", -1), ("cat/b.jpg", -1)])


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize(
    ("others", "test"), [(("val", "test"), "test"), (("val",), "val"), (("validation",), "validation")]
)
def test_split_folders_become_splits(tmp_path: Path, train: str, others: tuple[str, ...], test: str) -> None:
    names = [f"{part}/{name}" for part in (train, *others) for name in ("cat/1.png", "dog/2.png")]
    source = open_folder_set(write_named_files(tmp_path, *names, "meta/x.png"), test_fraction=0.5)
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 2, "test": 2})
    assert list_labels(source) == [(f"{train}/cat/1.png", 0), (f"{train}/dog/2.png", 1)]
    assert list_labels(source, "test") == [(f"{test}/cat/1.png", 0), (f"{test}/dog/2.png", 1)]


def test_names_outside_split_folders_are_noted(tmp_path: Path) -> None:
    root = write_named_files(
        tmp_path, "train/cat/1.jpg", "test/cat/2.jpg", "val/cat/3.jpg", "4.jpg", "readme.txt", ".git/5.jpg"
    )
    assert open_folder_set(root).unread_note == "not read, as train and test are the splits: 4.jpg, val"
    assert open_folder_set(root / "train").unread_note == ""


def test_formats_that_are_not_decoded_are_listed(tmp_path: Path) -> None:
    assert list_labels(open_folder_set(write_named_files(tmp_path, "1.HEIC", "2.jpg", "3.avif", "4.jxl"))) == [
        ("1.HEIC", -1),
        ("2.jpg", -1),
        ("3.avif", -1),
        ("4.jxl", -1),
    ]


def test_too_large_file_is_not_read(tmp_path: Path) -> None:
    root = write_named_files(tmp_path, "1.jpg", "2.jpg")
    os.truncate(root / "2.jpg", MAX_IMAGE_BYTES + 1)
    assert [record.reason for record in read_split(open_folder_set(root))] == [
        None,
        f"has {MAX_IMAGE_BYTES + 1} bytes (at most {MAX_IMAGE_BYTES})",
    ]


def test_split_with_stray_image_is_unlabelled(tmp_path: Path) -> None:
    source = open_folder_set(write_named_files(tmp_path, "train/cat/1.png", "test/2.png"))
    assert (source.classes, list_labels(source, "test")) == (("cat",), [("test/2.png", -1)])
    source = open_folder_set(write_named_files(tmp_path, "train/3.png"))
    assert (source.classes, list_labels(source)) == ((), [("train/3.png", -1), ("train/cat/1.png", -1)])


def test_class_missing_in_training_split_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: test/emu/2\.png: the training split has no class 'emu'"):
        open_folder_set(write_named_files(tmp_path, "train/cat/1.png", "test/cat/1.png", "test/emu/2.png"))


@pytest.mark.fault(54, "links that lead out of the root")
def test_links_are_read_only_within_root(tmp_path: Path) -> None:
    outside = write_named_files(tmp_path / "outside", "secret.jpg")
    root = write_named_files(tmp_path / "root", "cat/1.jpg", "dog/2.jpg")
    os.symlink(outside / "secret.jpg", root / "cat" / "out.jpg")
    os.symlink("../cat/1.jpg", root / "dog" / "in.jpg")
    os.symlink("nowhere.jpg", root / "dog" / "none.jpg")
    os.symlink(outside, root / "more")
    os.symlink(root, root / "dog" / "round")
    os.symlink("self.jpg", root / "dog" / "self.jpg")
    os.mkfifo(root / "dog" / "pipe.jpg")
    source = open_folder_set(root)
    found = {record.path: (record.label, record.data, record.reason) for record in read_split(source)}
    assert source.classes == ("cat", "dog")
    assert found == {
        "cat/1.jpg": (0, b"cat/1.jpg", None),
        "cat/out.jpg": (0, None, "link leaves the root"),
        "dog/2.jpg": (1, b"dog/2.jpg", None),
        "dog/in.jpg": (1, b"cat/1.jpg", None),
        "dog/none.jpg": (1, None, "No such file or directory"),
        "dog/pipe.jpg": (1, None, "is no file but a pipe, socket or device"),
        "dog/round": (-1, None, "Is a directory"),
        "dog/self.jpg": (1, None, "Too many levels of symbolic links"),
        "more": (-1, None, "link leaves the root"),
    }


def test_root_may_be_link_but_split_folder_may_not(tmp_path: Path) -> None:
    write_named_files(tmp_path / "real", "train/cat/1.jpg")
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert read_split(open_folder_set(tmp_path / "link"))[0].data == b"train/cat/1.jpg"
    (tmp_path / "other").mkdir()
    os.symlink(tmp_path / "real" / "train", tmp_path / "other" / "train")
    with pytest.raises(UserError, match=r"dataset\.root: .*other/train' is a link"):
        open_folder_set(tmp_path / "other")


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with open(os.fsencode(tmp_path) + b"/caf\xe9/\xff.jpg", "wb") as file:
        file.write(b"x")
    source = pickle.loads(pickle.dumps(open_folder_set(tmp_path)))
    assert source.classes == ("caf\\udce9",)
    assert read_split(source) == [Record("caf\\udce9/\\udcff.jpg", b"x", 0)]


def test_removed_file_becomes_record_with_reason(tmp_path: Path) -> None:
    source = open_folder_set(write_named_files(tmp_path, "cat/1.jpg", "cat/2.jpg"))
    (tmp_path / "cat" / "1.jpg").unlink()
    assert read_split(source) == [
        Record("cat/1.jpg", None, 0, "No such file or directory"),
        Record("cat/2.jpg", b"cat/2.jpg", 0),
    ]


def test_fingerprint_changes_with_files(tmp_path: Path) -> None:
    seen = {open_folder_set(write_named_files(tmp_path, "a.jpg")).fingerprint}
    for change in (
        lambda: write_named_files(tmp_path, "b.jpg"),
        lambda: os.utime(tmp_path / "a.jpg", (1, 1)),
        lambda: (tmp_path / "b.jpg").rename(tmp_path / "c.jpg"),
    ):
        change()
        assert open_folder_set(tmp_path).fingerprint == open_folder_set(tmp_path).fingerprint
        seen.add(open_folder_set(tmp_path).fingerprint)
    assert len(seen) == 4

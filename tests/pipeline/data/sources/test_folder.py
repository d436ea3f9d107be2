"""A folder of images: classes, splits, links, names, and what is refused."""

import os
import pickle
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import Record
from firstlight.pipeline.data.sources.files import MAX_BYTES
from firstlight.pipeline.errors import UserError
from tests.support.tiny import everything, files, folder, summary


def test_folder_of_classes(tmp_path: Path) -> None:
    source = folder(
        files(tmp_path, "dog/b.PNG", "cat/z/a.jpg", "cat/B.jpeg", "dog/notes.txt", ".hidden/x.jpg", "cat/.x.jpg")
    )
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 3})
    assert summary(source) == [("cat/B.jpeg", 0), ("cat/z/a.jpg", 0), ("dog/b.PNG", 1)]
    assert [record.data for record in everything(source)] == [b"cat/B.jpeg", b"cat/z/a.jpg", b"dog/b.PNG"]


def test_images_beside_the_folders_make_it_unlabelled(tmp_path: Path) -> None:
    source = folder(files(tmp_path, "a.jpg", "cat/b.jpg"))
    assert (source.classes, summary(source)) == ((), [("a.jpg", -1), ("cat/b.jpg", -1)])


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize(
    ("others", "test"), [(("val", "test"), "test"), (("val",), "val"), (("validation",), "validation")]
)
def test_split_folders(tmp_path: Path, train: str, others: tuple[str, ...], test: str) -> None:
    names = [f"{part}/{name}" for part in (train, *others) for name in ("cat/1.png", "dog/2.png")]
    source = folder(files(tmp_path, *names, "meta/x.png"), test_fraction=0.5)
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 2, "test": 2})
    assert summary(source) == [(f"{train}/cat/1.png", 0), (f"{train}/dog/2.png", 1)]
    assert summary(source, "test") == [(f"{test}/cat/1.png", 0), (f"{test}/dog/2.png", 1)]


def test_what_belongs_to_no_split_is_told(tmp_path: Path) -> None:
    root = files(tmp_path, "train/cat/1.jpg", "test/cat/2.jpg", "val/cat/3.jpg", "4.jpg", "readme.txt", ".git/5.jpg")
    assert folder(root).aside == "not read, as train and test are the splits: 4.jpg, val"
    assert folder(root / "train").aside == ""


def test_photos_of_formats_that_are_not_decoded_are_not_passed_over(tmp_path: Path) -> None:
    assert summary(folder(files(tmp_path, "1.HEIC", "2.jpg", "3.avif", "4.jxl"))) == [
        ("1.HEIC", -1),
        ("2.jpg", -1),
        ("3.avif", -1),
        ("4.jxl", -1),
    ]


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    root = files(tmp_path, "1.jpg", "2.jpg")
    os.truncate(root / "2.jpg", MAX_BYTES + 1)
    assert [record.reason for record in everything(folder(root))] == [
        None,
        f"has {MAX_BYTES + 1} bytes (at most {MAX_BYTES})",
    ]


def test_unlabelled_splits(tmp_path: Path) -> None:
    source = folder(files(tmp_path, "train/cat/1.png", "test/2.png"))
    assert (source.classes, summary(source, "test")) == (("cat",), [("test/2.png", -1)])
    source = folder(files(tmp_path, "train/3.png"))
    assert (source.classes, summary(source)) == ((), [("train/3.png", -1), ("train/cat/1.png", -1)])


def test_class_that_only_the_test_split_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: test/emu/2\.png: the training split has no class 'emu'"):
        folder(files(tmp_path, "train/cat/1.png", "test/cat/1.png", "test/emu/2.png"))


@pytest.mark.fault(54, "links that lead out of the root")
def test_links(tmp_path: Path) -> None:
    outside = files(tmp_path / "outside", "secret.jpg")
    root = files(tmp_path / "root", "cat/1.jpg", "dog/2.jpg")
    os.symlink(outside / "secret.jpg", root / "cat" / "out.jpg")
    os.symlink("../cat/1.jpg", root / "dog" / "in.jpg")
    os.symlink("nowhere.jpg", root / "dog" / "none.jpg")
    os.symlink(outside, root / "more")
    os.symlink(root, root / "dog" / "round")
    os.symlink("self.jpg", root / "dog" / "self.jpg")
    os.mkfifo(root / "dog" / "pipe.jpg")
    source = folder(root)
    found = {record.path: (record.label, record.data, record.reason) for record in everything(source)}
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


def test_a_root_that_is_a_link_is_followed_but_a_split_is_not(tmp_path: Path) -> None:
    files(tmp_path / "real", "train/cat/1.jpg")
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert everything(folder(tmp_path / "link"))[0].data == b"train/cat/1.jpg"
    (tmp_path / "other").mkdir()
    os.symlink(tmp_path / "real" / "train", tmp_path / "other" / "train")
    with pytest.raises(UserError, match=r"dataset\.root: .*other/train' is a link"):
        folder(tmp_path / "other")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with open(os.fsencode(tmp_path) + b"/caf\xe9/\xff.jpg", "wb") as file:
        file.write(b"x")
    source = pickle.loads(pickle.dumps(folder(tmp_path)))
    assert source.classes == ("caf\\udce9",)
    assert everything(source) == [Record("caf\\udce9/\\udcff.jpg", b"x", 0)]


def test_what_vanished_is_a_record_with_its_reason(tmp_path: Path) -> None:
    source = folder(files(tmp_path, "cat/1.jpg", "cat/2.jpg"))
    (tmp_path / "cat" / "1.jpg").unlink()
    assert everything(source) == [
        Record("cat/1.jpg", None, 0, "No such file or directory"),
        Record("cat/2.jpg", b"cat/2.jpg", 0),
    ]


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    seen = {folder(files(tmp_path, "a.jpg")).fingerprint}
    for change in (
        lambda: files(tmp_path, "b.jpg"),
        lambda: os.utime(tmp_path / "a.jpg", (1, 1)),
        lambda: (tmp_path / "b.jpg").rename(tmp_path / "c.jpg"),
    ):
        change()
        assert folder(tmp_path).fingerprint == folder(tmp_path).fingerprint
        seen.add(folder(tmp_path).fingerprint)
    assert len(seen) == 4

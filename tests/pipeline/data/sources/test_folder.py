"""A folder of images: classes, splits, links, names, and what is refused."""

import os
import pickle
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import Record
from firstlight.pipeline.data.sources.files import MAX_IMAGE_BYTES
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import list_labels, make_png, open_folder_set, read_split, write_named_files


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
@pytest.mark.parametrize("others", [("val", "test"), ("val",), ("validation",), ("test",)])
def test_split_folders_become_splits(tmp_path: Path, train: str, others: tuple[str, ...]) -> None:
    names = [f"{part}/{name}" for part in (train, *others) for name in ("cat/1.png", "dog/2.png")]
    source = open_folder_set(write_named_files(tmp_path, *names, "meta/x.png"), test_fraction=0.0)
    found = {"test": "test", "val": "val", "validation": "val"}
    assert source.classes == ("cat", "dog")
    assert source.splits == {"train": 2, **{found[name]: 2 for name in others}}
    for name, split in {train: "train", **{name: found[name] for name in others}}.items():
        assert list_labels(source, split) == [(f"{name}/cat/1.png", 0), (f"{name}/dog/2.png", 1)]


def test_names_outside_split_folders_are_noted(tmp_path: Path) -> None:
    root = write_named_files(
        tmp_path, "train/cat/1.jpg", "test/cat/2.jpg", "more/cat/3.jpg", "4.jpg", "readme.txt", ".git/5.jpg"
    )
    source = open_folder_set(root)
    assert source.notes == ("not read, outside of the splits: 4.jpg, more",)
    assert source.reading == (
        "read 2 files, left out 4: images outside of the splits 2, .txt 1, hidden 1",
        "splits: training = train; test = test",
        "classes, 1 with their training images: cat 1",
    )
    assert open_folder_set(root / "train").notes == ()


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
    given = {"train": "train", "test": "test"}
    source = open_folder_set(write_named_files(tmp_path, "train/cat/1.png", "test/2.png"), splits=given)
    assert (source.classes, list_labels(source, "test")) == (("cat",), [("test/2.png", -1)])
    source = open_folder_set(write_named_files(tmp_path, "train/3.png"))
    assert (source.classes, list_labels(source)) == ((), [("train/3.png", -1), ("train/cat/1.png", -1)])
    assert source.notes[0] == ("the training split has no labels, as 1 images lie beside the folders cat: train/3.png")


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
        "dog/self.jpg": (1, None, "Too many levels of symbolic links"),
    }
    assert source.notes == (
        "left out, as they are links to folders: dog/round, more; dataset.follow_links=true reads them",
        "1 image not read, as they are links out of the root: cat/out.jpg; dataset.follow_links=true reads them",
    )


def test_root_may_be_link_but_split_folder_may_not(tmp_path: Path) -> None:
    write_named_files(tmp_path / "real", "train/cat/1.jpg")
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert read_split(open_folder_set(tmp_path / "link"))[0].data == b"train/cat/1.jpg"
    (tmp_path / "other").mkdir()
    os.symlink(tmp_path / "real" / "train", tmp_path / "other" / "train")
    with pytest.raises(UserError, match=r"dataset\.root: .*other/train' is a link; valid: dataset\.follow_links=true"):
        open_folder_set(tmp_path / "other")
    assert read_split(open_folder_set(tmp_path / "other", follow_links=True))[0].data == b"train/cat/1.jpg"


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


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("TRAIN", "TEST"),
        ("train2017", "test2017"),
        ("training_set", "testset"),
        ("trainval", "eval"),
    ],
)
def test_split_folders_are_no_classes(tmp_path: Path, train: str, test: str) -> None:
    root = write_named_files(
        tmp_path, *(f"{part}/{kind}/{k}.jpg" for part in (train, test) for kind in "ab" for k in range(3))
    )
    source = open_folder_set(root)
    assert (source.classes, source.splits) == (("a", "b"), {"train": 6, "test": 6})
    assert {path.partition("/")[0] for path, _ in list_labels(source)} == {train}
    assert source.reading[1] == f"splits: training = {train}; test = {test}"


@pytest.mark.parametrize("val", ["val", "validation", "valid", "dev", "VAL", "val2017"])
def test_val_folder_is_the_held_out_split(tmp_path: Path, val: str) -> None:
    root = write_named_files(
        tmp_path, *(f"{part}/{kind}/{k}.jpg" for part in ("train", val) for kind in "ab" for k in range(5))
    )
    source = open_folder_set(root, test_fraction=0.2)
    assert source.splits == {"train": 8, "val": 10, "test": 2}
    assert {path.partition("/")[0] for path, _ in list_labels(source, "val")} == {val}
    assert "held out: 10 images, instead of a part of the training split" in source.reading


def test_flat_test_folder_without_labels_leaves_val_to_test_on(tmp_path: Path) -> None:
    names = [f"{part}/{kind}/{k}.JPEG" for part in ("train", "val") for kind in ("n01", "n02") for k in range(3)]
    source = open_folder_set(write_named_files(tmp_path, *names, "test/1.JPEG", "test/2.JPEG"), test_fraction=0.2)
    assert source.splits == {"train": 6, "test": 6}
    assert list_labels(source, "test")[0] == ("val/n01/0.JPEG", 0)
    assert source.notes == (
        "left out, as none has a label: 2 images of the test split; dataset.splits={train: ..., test: ...} keeps them",
        "the held-out split is tested on, as the test split has no labels: 6 images",
    )
    assert open_folder_set(tmp_path, splits={"train": "train", "test": "val"}).splits == {"train": 6, "test": 6}


@pytest.mark.parametrize("wrapper", ["mydata", "images", "data/set/v2"])
def test_wrapper_folders_are_looked_through_and_reported(tmp_path: Path, wrapper: str) -> None:
    root = write_named_files(tmp_path, *(f"{wrapper}/{kind}/{k}.jpg" for kind in ("cat", "dog") for k in range(2)))
    source = open_folder_set(root)
    assert source.classes == ("cat", "dog")
    assert f"the images of the root are all in {wrapper}, which is looked through" in source.reading


def test_layout_of_yolo_is_read(tmp_path: Path) -> None:
    names = [
        f"{kind}/{part}/{k}.{end}"
        for part in ("train", "val")
        for k in range(4)
        for kind, end in (("images", "jpg"), ("labels", "txt"))
    ]
    source = open_folder_set(write_named_files(tmp_path, *names), test_fraction=0.0)
    assert (source.classes, source.splits) == ((), {"train": 4, "val": 4})
    assert source.reading[0] == "read 8 files, left out 8: .txt 8"


def test_folders_of_systems_are_no_classes(tmp_path: Path) -> None:
    odd = ("__MACOSX", "$RECYCLE.BIN", "lost+found", "__pycache__", "@eaDir", "System Volume Information")
    root = write_named_files(tmp_path, "cat/1.jpg", "dog/2.jpg", *(f"{name}/3.jpg" for name in odd), ".cache/4.jpg")
    source = open_folder_set(root)
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 2})
    assert source.reading[0].startswith("read 2 files, left out 7: ")
    assert all(f"in {name} 1" in source.reading[0] for name in odd)


def test_empty_class_folders_and_linked_ones_are_reported_by_name(tmp_path: Path) -> None:
    root = write_named_files(tmp_path / "root", "train/cat/1.jpg", "train/dog/2.jpg", "train/cow/readme.txt")
    (root / "train" / "emu").mkdir()
    write_named_files(tmp_path / "fox", "3.jpg")
    os.symlink(tmp_path / "fox", root / "train" / "fox")
    source = open_folder_set(root)
    assert source.classes == ("cat", "dog")
    assert source.notes == (
        "left out, as they are links to folders: train/fox; dataset.follow_links=true reads them",
        "folders without an image: train/cow, train/emu",
    )
    followed = open_folder_set(root, follow_links=True)
    assert followed.classes == ("cat", "dog", "fox")
    assert read_split(followed)[-1].data == b"3.jpg"


def test_images_that_are_all_links_ask_for_the_key(tmp_path: Path) -> None:
    blobs = write_named_files(tmp_path / "blobs", *"0123")
    for k in range(4):
        (tmp_path / "snapshot" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        os.symlink(blobs / str(k), tmp_path / "snapshot" / "ab"[k % 2] / f"{k}.jpg")
    with pytest.raises(
        UserError, match=r"all 4 images in .* are links out of it, e\.g\. a/0\.jpg; dataset\.follow_links=true"
    ):
        open_folder_set(tmp_path / "snapshot")
    source = open_folder_set(tmp_path / "snapshot", follow_links=True)
    assert [record.data for record in read_split(source)] == [b"0", b"2", b"1", b"3"]


def test_images_without_image_ending_are_read_by_their_bytes(tmp_path: Path) -> None:
    for k, name in enumerate(("cat/1", "cat/2.jpg.1", "dog/3.jpg?w=300", "dog/4.jpe", "emu/5.mpo", "emu/6.JPG")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_png(k))
    source = open_folder_set(write_named_files(tmp_path, "emu/notes.txt", "emu/LICENSE"))
    assert (source.classes, source.splits) == (("cat", "dog", "emu"), {"train": 6})
    assert source.reading[0] == "read 6 files, left out 2: .txt 1, no ending 1"
    assert source.notes == (
        "3 images with other endings, or none, read by their bytes: .1 1, .jpg?w=300 1, no ending 1",
    )


def test_class_folders_that_look_alike_are_reported_or_merged(tmp_path: Path) -> None:
    root = write_named_files(tmp_path, "train/Cat/1.jpg", "train/cat/2.jpg", "train/dog/3.jpg", "test/CAT/4.jpg")
    with pytest.raises(UserError, match=r"no class 'CAT'; 'Cat' is one: dataset\.label_case=lower reads both alike"):
        open_folder_set(root)
    source = open_folder_set(root, label_case="lower")
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 0, 0, 1])
    assert source.notes[0] == "folders read as one class: 'CAT' and 'Cat' and 'cat'"
    (root / "test" / "CAT" / "4.jpg").rename(root / "train" / "dog" / "4.jpg")
    assert open_folder_set(root).notes[0].startswith("classes that look alike are kept apart: 'Cat' (1) and 'cat' (1)")


def test_folder_of_other_files_names_their_source(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no images .*read 0 files, left out 2: \.tar 2\); valid besides: dataset\.source=webd"
    ):
        open_folder_set(write_named_files(tmp_path, "a.tar", "b.tar"))


def test_unlabelled_folder_beside_classes_has_no_label(tmp_path: Path) -> None:
    source = open_folder_set(write_named_files(tmp_path, "cat/1.jpg", "dog/2.jpg", "unlabeled/3.jpg"))
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 1, -1])
    assert source.notes == ("1 images in unlabeled have no label",)

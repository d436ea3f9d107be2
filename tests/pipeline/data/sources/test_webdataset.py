"""Tar archives of samples: labels, splits, roots that name archives, damage."""

import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.manifest import QUARANTINE_FILE
from firstlight.pipeline.data.sources import Record, webdataset
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import (
    dataset_options,
    list_labels,
    list_reasons,
    make_png,
    open_archives,
    prepare_store,
    read_split,
)
from tests.support.webdataset_shards import Member, make_samples, make_special_member, write_shard


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_samples_are_read_in_order(tmp_path: Path, suffix: str) -> None:
    write_shard(
        tmp_path / f"b{suffix}",
        *make_samples("x/y/0002", "x/y/0001"),
        make_special_member("x", tarfile.DIRTYPE),
        ("x/.hidden.jpg", b""),
        ("README", b"x"),
    )
    write_shard(tmp_path / f"a{suffix}", *make_samples("0000"))
    source = pickle.loads(pickle.dumps(open_archives(tmp_path)))
    assert (source.classes, source.splits) == (("0", "1", "2"), {"train": 3})
    assert read_split(source) == [
        Record(f"a{suffix}/0000.jpg", b"0000", 0),
        Record(f"b{suffix}/x/y/0002.jpg", b"x/y/0002", 2),
        Record(f"b{suffix}/x/y/0001.jpg", b"x/y/0001", 1),
    ]


def test_labels_come_from_cls_or_json(tmp_path: Path) -> None:
    def label(key: str, **record: Any) -> list[Member]:
        return [(f"{key}.png", b""), (f"{key}.json", json.dumps(record).encode()), (f"{key}.txt", b"a caption")]

    write_shard(
        tmp_path / "x.tar",
        *label("a", label="dog", kind=1),
        *label("b", kind=0),
        *label("c", label="cat"),
        ("d.png", b""),
        ("d.cls", b"cat\n"),
    )
    source = open_archives(tmp_path)
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, -1, 0, 0])
    assert (
        open_archives(tmp_path, label_column="txt").classes,
        open_archives(tmp_path, label_column=None).classes,
    ) == (
        ("a caption", "cat"),
        (),
    )
    write_shard(tmp_path / "x.tar", *label("a", kind=1), *label("b", kind=0))
    assert open_archives(tmp_path, label_column="kind").labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("auk\n")
    with pytest.raises(UserError, match=r"x\.tar/a\.png: label 1 is out of range: .*classes\.txt has 1 classes"):
        open_archives(tmp_path, label_column="kind")


@pytest.mark.parametrize("others", [["test", "val"], ["val"], ["validation"], ["test"]])
@pytest.mark.parametrize("form", ["{}-000.tar", "cc3m-{}-0000.tar", "{}/00000.tar"])
def test_names_of_archives_define_splits(tmp_path: Path, others: list[str], form: str) -> None:
    for name in ("train", *others):
        write_shard(tmp_path / form.format(name), *make_samples(f"{name}0", f"{name}1"))
    source = open_archives(tmp_path, test_fraction=0.0)
    for name in ("train", *others):
        split = name if name in ("train", "test") else "val"
        assert [record.data for record in read_split(source, split)] == [f"{name}0".encode(), f"{name}1".encode()]
    assert len(source.splits) == 1 + len(others)


def test_root_may_name_archives(tmp_path: Path) -> None:
    for k in range(8, 12):
        write_shard(tmp_path / f"part-{k:02d}.tar", *make_samples(f"k{k}"))
    for root, found in (
        ("part-{08..10}.tar", ["k8", "k9", "k10"]),
        ("part-1?.tar", ["k10", "k11"]),
        ("part-{08..09}*.tar", ["k8", "k9"]),
        ("part-09.tar", ["k9"]),
    ):
        for top in (str(tmp_path), tmp_path.as_uri()):
            assert [record.data for record in read_split(open_archives(f"{top}/{root}"))] == [
                key.encode() for key in found
            ]
    for root, text in (
        ("part-{08..12}.tar", r"part-12\.tar: cannot be read: No such file"),
        ("x-*.tar", r"no x-\*\.tar files in"),
        ("part-{9..8}.tar", r"'\{9\.\.8\}' is no range"),
        ("part-{0..9999999999}.tar", "is no range of 1 to"),
        ("none", "does not exist"),
        ("none/x.tar", "does not exist"),
    ):
        with pytest.raises(UserError, match=rf"^dataset\.root: .*{text}"):
            open_archives(tmp_path / root)
    with pytest.raises(UserError, match=r"^dataset\.root: no \*\.tar, \*\.tar\.gz, \*\.tgz files in"):
        open_archives((tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_damaged_compression_is_reason(tmp_path: Path) -> None:
    file = write_shard(tmp_path / "b.tar.gz", *[(f"{k}.jpg", os.urandom(50_000)) for k in range(8)])
    whole, data = read_split(open_archives(tmp_path)), file.read_bytes()
    source = open_archives(tmp_path)
    file.write_bytes(data[: len(data) // 2])
    assert [record.path for record in read_split(source)] == [f"b.tar.gz/{k}.jpg" for k in range(8)]
    read = [record.data for record in read_split(source) if record.data is not None]
    assert 1 <= len(read) < 8
    assert read == [record.data for record in whole[: len(read)]]
    assert all("b.tar.gz cannot be read: " in str(record.reason) for record in read_split(source)[len(read) :])
    listed_again = read_split(open_archives(tmp_path))
    assert [record.path for record in listed_again if record.reason] == ["b.tar.gz"]


def test_archives_of_no_split_are_noted(tmp_path: Path) -> None:
    for part in ("train", "test", "extra"):
        write_shard(tmp_path / f"{part}-0.tar", *make_samples("0000"))
    assert open_archives(tmp_path).notes == ("not read, as others are named for the splits: extra-0.tar",)


def test_archives_without_images_raise(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"nonsense" * 1000)
    with pytest.raises(
        UserError, match=r"dataset\.root: no images, but e\.g\. 'the archive is damaged.* in a\.tar of "
    ):
        open_archives(tmp_path)
    write_shard(tmp_path / "a.tar", ("a.txt", b""))
    with pytest.raises(UserError, match=r"dataset\.root: no images in a\.tar of "):
        open_archives(tmp_path)


def test_changed_archive_is_reason(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", *make_samples("a0", "b1"))
    source = open_archives(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert list_reasons(source) == [("a.tar/a0.jpg", "a.tar ends before it"), ("a.tar/b1.jpg", "a.tar ends before it")]
    (tmp_path / "a.tar").unlink()
    assert [reason for _, reason in list_reasons(source)] == [
        f"a.tar cannot be read: [Errno 2] No such file or directory: '{tmp_path}/a.tar'"
    ] * 2


def test_fingerprint_changes_with_archives(tmp_path: Path) -> None:
    seen = {open_archives(write_shard(tmp_path / "a.tar", *make_samples("a0")).parent).fingerprint}
    assert open_archives(tmp_path).fingerprint in seen
    os.utime(tmp_path / "a.tar", (1, 1))
    seen.add(open_archives(tmp_path).fingerprint)
    seen.add(open_archives(write_shard(tmp_path / "b.tar", *make_samples("b0")).parent).fingerprint)
    (tmp_path / "classes.txt").write_text("a\n")
    seen.add(open_archives(tmp_path).fingerprint)
    assert len(seen) == 4


def test_parts_are_read_at_offsets_and_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"k{k:02d}" for k in range(20)]
    write_shard(tmp_path / "a.tar", *make_samples(*keys[:9]))
    write_shard(tmp_path / "b.tar.gz", *make_samples(*keys[9:]))
    source = open_archives(tmp_path, test_fraction=0.3)
    monkeypatch.setattr(webdataset, "index_archive", None)  # reading, and a second opening, list nothing again
    assert open_archives(tmp_path, test_fraction=0.3).fingerprint == source.fingerprint
    for rows in (1, 3, 20):
        read = [
            str((record.data or b"").decode()) for part in source.split_into_parts(rows) for record in source.read(part)
        ]
        assert sorted(read) == keys
        assert read[: source.splits["train"]] == sorted(read[: source.splits["train"]])


def test_archives_are_prepared_as_store(tmp_path: Path) -> None:
    def of(*numbers: int) -> list[Member]:
        return [
            member for k in numbers for member in ((f"{k:03d}.png", make_png(k)), (f"{k:03d}.cls", b"%d" % (k % 2)))
        ]

    write_shard(
        tmp_path / "tars" / "train-0.tar", *of(*range(8)), make_special_member("x.png", tarfile.SYMTYPE, "000.png")
    )
    write_shard(tmp_path / "tars" / "train-1.tar.gz", *of(*range(8, 16)))
    write_shard(tmp_path / "tars" / "test-0.tar", *of(16, 17))
    store = prepare_store(dataset_options(source="webdataset", root=tmp_path / "tars"), tmp_path / "stores")
    assert (store.quarantined, store.splits) == (1, {"train": 16, "test": 2})
    assert store.labels("train").tolist() == [0, 1] * 8
    assert pq.read_table(store.path / QUARANTINE_FILE).column("path").to_pylist() == ["train-0.tar/x.png"]
    assert list_labels(open_archives(tmp_path / "tars"), "test") == [
        ("test-0.tar/016.png", 0),
        ("test-0.tar/017.png", 1),
    ]


def write_samples(folder: Path, *forms: str, count: int = 6) -> Path:
    """Writes samples of forms such as {:03d}.jpg. Images hold their form and number, labels the number modulo 2."""
    members: list[Member] = []
    for k in range(count):
        for form in forms:
            is_label = form.endswith((".cls", ".txt", ".json"))
            text = b"%d" % (k % 2) if is_label else make_png(k) + form.encode()
            members.append((form.format(k), text))
    write_shard(folder / "x.tar", *members)
    return folder


@pytest.mark.parametrize(
    ("forms", "field", "note"),
    [
        (
            ("{:05d}.depth.png", "{:05d}.jpg", "{:05d}.cls"),
            ".jpg",
            "the image of a sample is jpg; left out beside it: depth.png 6",
        ),
        (("{:05d}.image.jpg", "{:05d}.cls"), ".image.jpg", ""),
        (("{:05d}.img", "{:05d}.cls"), ".img", ""),
        (("{:05d}.IMG.PNG", "{:05d}.label.cls"), ".IMG.PNG", ""),
        (("v1.0/{:05d}.jpg", "v1.0/{:05d}.cls"), ".jpg", ""),
        (("img.{:05d}.jpg", "img.{:05d}.cls"), ".jpg", "keys have dots: names are split at the last one"),
        (
            ("{:05d}.seg.png", "{:05d}.jpg", "{:05d}.thumb.jpg", "{:05d}.cls"),
            ".jpg",
            "the image of a sample is jpg; left out",
        ),
    ],
)
def test_samples_are_read_as_the_library_does(tmp_path: Path, forms: tuple[str, ...], field: str, note: str) -> None:
    source = open_archives(write_samples(tmp_path, *forms))
    found = read_split(source)
    assert [record.label for record in found] == [0, 1] * 3
    assert all(record.path.endswith(field) and record.reason is None for record in found)
    assert [found.startswith(note) for found in source.notes] == [True] * bool(note)
    assert source.classes == ("0", "1")


def test_image_field_may_be_named(tmp_path: Path) -> None:
    write_samples(tmp_path, "{:05d}.depth.png", "{:05d}.jpg")
    assert read_split(open_archives(tmp_path, image_column="depth.png"))[0].path == "x.tar/00000.depth.png"
    with pytest.raises(
        UserError, match=r"dataset\.image_column: 'tif' is no field of a sample; fields with images: depth\.png 6"
    ):
        open_archives(tmp_path, image_column="tif")
    write_samples(tmp_path, "{:05d}.left.png", "{:05d}.right.png")
    with pytest.raises(
        UserError, match=r"samples have several images: left\.png 6, right\.png 6; valid: dataset\.image_col"
    ):
        open_archives(tmp_path)
    assert len(read_split(open_archives(tmp_path, image_column="left.png"))) == 6


@pytest.mark.parametrize("prefix", ["", "data/", "./", "mydata/images/"])
def test_folder_of_the_key_is_the_class(tmp_path: Path, prefix: str) -> None:
    write_shard(tmp_path / "x.tar", *((f"{prefix}{kind}/{k}.jpg", b"x") for kind in ("cat", "dog") for k in range(3)))
    source = open_archives(tmp_path)
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0] * 3 + [1] * 3)
    assert any(line.startswith("no sample has a label: the folder of a key is its class") for line in source.reading)
    assert open_archives(tmp_path, label_column=None).classes == ()


def test_folders_of_splits_in_keys_are_no_classes(tmp_path: Path) -> None:
    names = [f"set/{part}/{kind}/{k}.jpg" for part in ("Train", "Test") for kind in ("cat", "dog") for k in range(3)]
    write_shard(tmp_path / "x.tar", *((name, b"x") for name in names))
    source = open_archives(tmp_path)
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 6, "test": 6})
    assert {record.path.split("/")[2] for record in read_split(source, "test")} == {"Test"}


def test_archives_in_subfolders_and_lists_of_archives_are_found(tmp_path: Path) -> None:
    for name in ("train/00.tar", "train/01.tar", "val/00.tar", "test/00.tar"):
        write_shard(tmp_path / name, *make_samples(f"{name[:-4]}1"))
    assert open_archives(tmp_path).splits == {"train": 2, "val": 1, "test": 1}
    assert open_archives(f"{tmp_path}/{{train,test}}/00.tar").splits == {"train": 1, "test": 1}
    assert open_archives(f"{tmp_path}/train/{{00,01}}.tar::{tmp_path}/val/00.tar").splits == {"train": 2, "val": 1}


def test_left_out_members_and_fields_of_json_are_reported(tmp_path: Path) -> None:
    record = json.dumps({"id": 3, "kind": "x"}).encode()
    write_shard(
        tmp_path / "x.tar", ("a.jpg", b"a"), ("a.json", record), ("a.txt", b"t"), ("._a.jpg", b""), ("README", b"")
    )
    source = open_archives(tmp_path)
    assert (
        source.reading[0] == "read 1 images, left out 3: .txt 1, hidden or of the system 1, no ending 1, of 1 archive"
    )
    assert source.notes == ("no .json file has the field 'label' (dataset.label_column); fields: id 1, kind 1",)
    write_shard(
        tmp_path / "x.tar",
        ("a.jpg", b"a"),
        ("a.json", b'{"class": true}'),
        ("b.jpg", b"b"),
        ("b.json", b'{"class": false}'),
    )
    source = open_archives(tmp_path)
    assert source.classes == ("False", "True")
    assert source.notes == ("dataset.label_column: there is no 'label', 'class' is taken in 2 .json files",)

"""Tiny sources in every layout, what is refused, and the split that is carved out."""

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Dataset
from pipeline.errors import UserError
from pipeline.images import decode
from pipeline.sources import Part, Record, Source, open_source


def dataset(**fields: Any) -> Dataset:
    crop = [{"op": "center_crop"}]
    raw = {"name": "tiny", "test_fraction": 0.0, "train_augment": crop, "eval_augment": crop, **fields}
    return Dataset.model_validate_json(json.dumps(raw, default=str))


def files(root: Path, *names: str) -> Path:
    """Files whose contents are their names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def table(file: Path, images: list[Any], labels: list[Any] | None = None, **columns: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, **({} if labels is None else {"label": labels}), **columns}), file, row_group_size=4)


def everything(source: Source, split: str = "train") -> list[Record]:
    return list(source.read(Part(split, 0, source.splits.get(split, 0))))


def summary(source: Source, split: str = "train") -> list[tuple[str, int]]:
    return [(record.path, record.label) for record in everything(source, split)]


# --- digits


def test_digits() -> None:
    source = open_source(dataset(source="digits"))
    assert (source.splits, source.classes) == ({"train": 1797}, tuple("0123456789"))
    first = next(iter(source.read(Part("train", 0, 1))))
    assert (first.path, first.label) == ("0", 0)
    from sklearn.datasets import load_digits

    expected = np.rint(load_digits().images[0] * 255 / 16)
    np.testing.assert_array_equal(decode(first.data or b"")[:, :, 0], expected)
    assert [record.label for record in source.read(Part("train", 100, 5))] == load_digits().target[100:105].tolist()
    assert open_source(dataset(source="digits")).fingerprint == source.fingerprint


# --- folder


def folder(root: Path, **fields: Any) -> Source:
    return open_source(dataset(source="folder", root=root, **fields))


def test_folder_of_classes(tmp_path: Path) -> None:
    source = folder(files(tmp_path, "dog/b.PNG", "cat/z/a.jpg", "cat/B.jpeg", "dog/notes.txt", ".hidden/x.jpg", "cat/.x.jpg"))
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 3})
    assert summary(source) == [("cat/B.jpeg", 0), ("cat/z/a.jpg", 0), ("dog/b.PNG", 1)]
    assert [record.data for record in everything(source)] == [b"cat/B.jpeg", b"cat/z/a.jpg", b"dog/b.PNG"]


def test_images_beside_the_folders_make_it_unlabelled(tmp_path: Path) -> None:
    source = folder(files(tmp_path, "a.jpg", "cat/b.jpg"))
    assert (source.classes, summary(source)) == ((), [("a.jpg", -1), ("cat/b.jpg", -1)])


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize(("others", "test"), [(("val", "test"), "test"), (("val",), "val"), (("validation",), "validation")])
def test_split_folders(tmp_path: Path, train: str, others: tuple[str, ...], test: str) -> None:
    names = [f"{part}/{name}" for part in (train, *others) for name in ("cat/1.png", "dog/2.png")]
    source = folder(files(tmp_path, *names, "meta/x.png"), test_fraction=0.5)
    assert (source.classes, source.splits) == (("cat", "dog"), {"train": 2, "test": 2})
    assert summary(source) == [(f"{train}/cat/1.png", 0), (f"{train}/dog/2.png", 1)]
    assert summary(source, "test") == [(f"{test}/cat/1.png", 0), (f"{test}/dog/2.png", 1)]


def test_unlabelled_splits(tmp_path: Path) -> None:
    source = folder(files(tmp_path, "train/cat/1.png", "test/2.png"))
    assert (source.classes, summary(source, "test")) == (("cat",), [("test/2.png", -1)])
    source = folder(files(tmp_path, "train/3.png"))
    assert (source.classes, summary(source)) == ((), [("train/3.png", -1), ("train/cat/1.png", -1)])


def test_class_that_only_the_test_split_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: test/emu/2\.png: the training split has no class 'emu'"):
        folder(files(tmp_path, "train/cat/1.png", "test/cat/1.png", "test/emu/2.png"))


def test_links(tmp_path: Path) -> None:
    outside = files(tmp_path / "outside", "secret.jpg")
    root = files(tmp_path / "root", "cat/1.jpg", "dog/2.jpg")
    os.symlink(outside / "secret.jpg", root / "cat" / "out.jpg")
    os.symlink("../cat/1.jpg", root / "dog" / "in.jpg")
    os.symlink("nowhere.jpg", root / "dog" / "none.jpg")
    os.symlink(outside, root / "more")
    os.symlink(root, root / "dog" / "round")
    source = folder(root)
    found = {record.path: (record.label, record.data, record.reason) for record in everything(source)}
    assert source.classes == ("cat", "dog")
    assert found == {
        "cat/1.jpg": (0, b"cat/1.jpg", None),
        "cat/out.jpg": (0, None, "link leaves the root"),
        "dog/2.jpg": (1, b"dog/2.jpg", None),
        "dog/in.jpg": (1, b"cat/1.jpg", None),
        "dog/none.jpg": (1, None, "No such file or directory"),
        "dog/round": (-1, None, "Is a directory"),
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
    assert everything(source) == [Record("cat/1.jpg", None, 0, "No such file or directory"), Record("cat/2.jpg", b"cat/2.jpg", 0)]


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


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_roots_that_are_none(tmp_path: Path, source: str) -> None:
    for root, text in ((tmp_path / "missing", "does not exist"), (files(tmp_path, "file.txt") / "file.txt", "is a file"), (tmp_path, "no .*in")):
        with pytest.raises(UserError, match=rf"dataset\.root: .*{text}"):
            open_source(dataset(source=source, root=root))


def test_parts_cover_every_image_once_and_in_order(tmp_path: Path) -> None:
    source = folder(files(tmp_path, *(f"train/{k:02d}.png" for k in range(7)), *(f"test/{k}.png" for k in range(4))))
    assert source.parts(3) == [Part("train", 0, 3), Part("train", 3, 3), Part("train", 6, 1), Part("test", 0, 3), Part("test", 3, 1)]
    paths = [record.path for part in source.parts(3) for record in source.read(part)]
    assert paths == [f"train/{k:02d}.png" for k in range(7)] + [f"test/{k}.png" for k in range(4)]


# --- the split that is carved out


def test_the_carved_split_is_stratified_and_steady(tmp_path: Path) -> None:
    names = [f"cat/{k}.png" for k in range(40)] + [f"dog/{k}.png" for k in range(10)] + ["emu/0.png"]
    source = folder(files(tmp_path, *names), test_fraction=0.2)
    train, test = summary(source), summary(source, "test")
    assert [label for _, label in test] == [0] * 8 + [1] * 2  # the only emu stays in training
    assert sorted(train + test) == sorted((name, {"c": 0, "d": 1, "e": 2}[name[0]]) for name in names)
    assert [path for path, _ in train] == sorted(path for path, _ in train)
    assert summary(folder(tmp_path, test_fraction=0.2), "test") == test
    assert summary(folder(tmp_path, test_fraction=0.2, split_seed=1), "test") != test
    more = summary(folder(files(tmp_path, *(f"cat/new{k}.png" for k in range(5))), test_fraction=0.2), "test")
    assert len(set(test) & set(more)) >= 8  # of 10: one more cat, and the newcomers that are drawn


def test_no_fraction_no_test_split(tmp_path: Path) -> None:
    assert folder(files(tmp_path, "a/1.png", "a/2.png"), test_fraction=0.0).splits == {"train": 2}
    assert folder(tmp_path, test_fraction=0.9).splits == {"train": 1, "test": 1}


def test_digits_are_carved_by_index() -> None:
    source = open_source(dataset(source="digits", test_fraction=0.2))
    test = source.labels[source.rows["test"]]
    assert source.splits == {"train": 1797 - len(test), "test": len(test)}
    np.testing.assert_array_equal(np.bincount(test), np.floor(np.bincount(source.labels) * 0.2 + 0.5))


# --- parquet


def parquet(root: Path, **fields: Any) -> Source:
    return open_source(dataset(source="parquet", root=root, **fields))


def structs(*names: str) -> list[dict[str, Any]]:
    return [{"bytes": name.encode(), "path": name} for name in names]


def test_parquet_of_structs_and_of_bytes(tmp_path: Path) -> None:
    table(tmp_path / "train-1.parquet", structs("c", "d"), [1, None])
    table(tmp_path / "train-0.parquet", structs("a", "b"), [0, 2])
    source = parquet(tmp_path)
    assert (source.classes, source.splits) == (("0", "1", "2"), {"train": 4})
    assert everything(source) == [
        Record("train-0.parquet#0 a", b"a", 0),
        Record("train-0.parquet#1 b", b"b", 2),
        Record("train-1.parquet#0 c", b"c", 1),
        Record("train-1.parquet#1 d", b"d", -1),
    ]
    assert everything(parquet(tmp_path, image_column="image.bytes")) == everything(source)
    for kind in (pa.binary(), pa.large_binary()):
        table(tmp_path / "bytes" / "x.parquet", pa.array([b"a", None], kind), [0, 0])
        assert everything(parquet(tmp_path / "bytes")) == [
            Record("x.parquet#0", b"a", 0),
            Record("x.parquet#1", None, 0, "the row has no image (null)"),
        ]


@pytest.mark.parametrize(("others", "test"), [(("test", "validation"), "test"), (("validation",), "validation"), (("val",), "val"), ((), None)])
def test_parquet_splits(tmp_path: Path, others: tuple[str, ...], test: str | None) -> None:
    for name in ("train", *others):
        table(tmp_path / f"{name}-00000-of-00001.parquet", [name.encode()] * 3, [0, 1, 1])
    source = parquet(tmp_path)
    assert {record.data for record in everything(source)} == {b"train"}
    assert {record.data for record in everything(source, "test")} == ({test.encode()} if test else set()) if "test" in source.splits else test is None


def test_parts_of_parquet_cross_row_groups_and_files(tmp_path: Path) -> None:
    names = [f"{k:02d}" for k in range(25)]
    table(tmp_path / "train-0.parquet", [n.encode() for n in names[:11]], [0] * 11)  # row groups of 4
    table(tmp_path / "train-1.parquet", [n.encode() for n in names[11:]], [0] * 14)
    for rows in (1, 3, 5, 25):
        for fields in ({}, {"test_fraction": 0.3}):
            source = pickle.loads(pickle.dumps(parquet(tmp_path, **fields)))
            read = [record.data.decode() for part in source.parts(rows) for record in source.read(part)]
            assert sorted(read) == names
            train = read[: source.splits["train"]]
            assert train == sorted(train)
            assert len(train) == (25 if not fields else 17)


def test_text_labels(tmp_path: Path) -> None:
    for labels in (["dog", None, "cat"], pa.array(["dog", None, "cat"]).dictionary_encode()):
        table(tmp_path / "x.parquet", [b"a", b"b", b"c"], labels)
        source = parquet(tmp_path)
        assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, -1, 0])


def test_no_labels(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", [b"a"])
    source = parquet(tmp_path, label_column=None)
    assert (source.classes, source.labels.tolist()) == ((), [-1])
    table(tmp_path / "x.parquet", [b"a", b"b"], [-1, -1])
    assert parquet(tmp_path).classes == ()


def test_class_names(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", [b"a", b"b"], [1, 0])
    features = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
    written = pq.read_table(tmp_path / "x.parquet").replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(written, tmp_path / "x.parquet")
    assert parquet(tmp_path).classes == ("ant", "bee")
    before = parquet(tmp_path).fingerprint
    (tmp_path / "classes.txt").write_text("auk\nboa\ncow\n")
    assert parquet(tmp_path).classes == ("auk", "boa", "cow")
    assert parquet(tmp_path).fingerprint != before
    (tmp_path / "classes.txt").write_text("auk\n")
    with pytest.raises(UserError, match=r"x\.parquet: row 0: label 1 is out of range: .*classes\.txt has 1 classes; valid: 0 to 0"):
        parquet(tmp_path)
    for text in ("a\na\n", "a\n\nb\n", ""):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=r"classes\.txt: must list every class once"):
            parquet(tmp_path)


@pytest.mark.parametrize(("labels", "text"), [([0, -2], "row 1: label -2"), ([10**15, 0], "row 0: label 1000000000000000")])
def test_impossible_labels(tmp_path: Path, labels: list[int], text: str) -> None:
    table(tmp_path / "train-0.parquet", [b"a"], [0])
    table(tmp_path / "train-1.parquet", [b"a", b"b"], labels)
    with pytest.raises(UserError, match=rf"train-1\.parquet: {text} is out of range"):
        parquet(tmp_path)


def test_mixed_labels(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", [b"a"], [0])
    table(tmp_path / "train-1.parquet", [b"a"], ["cat"])
    with pytest.raises(UserError, match=r"dataset\.label_column: 'label' has mixed types: text in .*train-1\.parquet, integers in .*train-0"):
        parquet(tmp_path)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"image_column": "img"}, "image_column: 'img'"),
        ({"image_column": "label"}, "image_column: 'label'"),
        ({"image_column": "label.bytes"}, "image_column: 'label.bytes'"),
        ({"image_column": "image.pixels"}, "image_column: 'image.pixels'"),
        ({"label_column": "class"}, "label_column: 'class'"),
        ({"label_column": "score"}, "label_column: 'score'"),
    ],
)
def test_columns_that_are_not_there_are_listed(tmp_path: Path, fields: dict[str, str], key: str) -> None:
    table(tmp_path / "x.parquet", structs("a"), [0], score=[0.5])
    with pytest.raises(UserError, match=rf"dataset\.{key} .*x\.parquet; columns: image \(struct<.*>\), label \(int64\), score \(double\)"):
        parquet(tmp_path, **fields)


def test_unreadable_parquet(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", [b"a" * 100] * 8, [0] * 8)
    data = (tmp_path / "train-0.parquet").read_bytes()
    for text in (b"", b"nonsense" * 10, data[:-20]):
        (tmp_path / "train-1.parquet").write_bytes(text)
        with pytest.raises(UserError, match=r"train-1\.parquet: cannot be read as Parquet"):
            parquet(tmp_path)


def test_damage_inside_costs_the_rows_and_names_the_file(tmp_path: Path) -> None:
    images = [os.urandom(100) for _ in range(12)]
    pq.write_table(
        pa.table({"image": images, "label": [0] * 12}), tmp_path / "x.parquet", row_group_size=4, write_page_checksum=True, write_statistics=False
    )
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    source = parquet(tmp_path)
    data[data.index(images[5]) + 3] ^= 1  # in the second row group
    (tmp_path / "x.parquet").write_bytes(data)
    records = everything(source)
    assert [record.data for record in records[:4]] == images[:4]
    assert len(records) == 12
    assert all(record.data is None and "x.parquet cannot be read" in str(record.reason) for record in records[4:8])
    assert [record.data for record in records[8:]] == images[8:]
    (tmp_path / "x.parquet").unlink()
    assert [(record.path, record.label) for record in everything(source)] == [(f"x.parquet#{k}", 0) for k in range(12)]
    assert {record.reason for record in everything(source)} == {
        f"x.parquet cannot be read: [Errno 2] Failed to open local file '{tmp_path}/x.parquet'. Detail: [errno 2] No such file or directory"
    }


def test_empty_parquet(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    with pytest.raises(UserError, match=r"dataset\.root: no rows in train\.parquet"):
        parquet(tmp_path)


def test_cifar10(cifar10: Path) -> None:
    source = parquet(cifar10)
    assert (source.splits, source.classes[0], len(source.classes)) == ({"train": 50_000, "test": 10_000}, "airplane", 10)
    np.testing.assert_array_equal(np.bincount(source.labels[source.rows["test"]]), [1000] * 10)
    across = list(source.read(Part("train", 12_498, 4)))  # over the seam of two files
    assert [record.path.split("#")[0][:11] for record in across] == ["train-00000"] * 2 + ["train-00001"] * 2
    assert {decode(record.data or b"").shape for record in across} == {(32, 32, 3)}


def test_sources_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        folder(files(tmp_path, "a.jpg")).classes = ("x",)  # type: ignore[misc]

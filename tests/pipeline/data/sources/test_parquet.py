"""Parquet files of images: columns, labels, splits, damage."""

import base64
import json
import os
import pickle
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.sources import Record, SourcePart
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import make_png, open_parquet_set, read_split, write_image_table


def structs(*names: str) -> list[dict[str, Any]]:
    return [{"bytes": name.encode(), "path": name} for name in names]


def test_structs_and_bytes_give_same_records(tmp_path: Path) -> None:
    write_image_table(tmp_path / "train-1.parquet", structs("c", "d"), [1, None])
    write_image_table(tmp_path / "train-0.parquet", structs("a", "b"), [0, 2])
    source = open_parquet_set(tmp_path)
    assert (source.classes, source.splits) == (("0", "1", "2"), {"train": 4})
    assert read_split(source) == [
        Record("train-0.parquet#0 a", b"a", 0),
        Record("train-0.parquet#1 b", b"b", 2),
        Record("train-1.parquet#0 c", b"c", 1),
        Record("train-1.parquet#1 d", b"d", -1),
    ]
    assert read_split(open_parquet_set(tmp_path, image_column="image.bytes")) == read_split(source)
    for kind in (pa.binary(), pa.large_binary()):
        write_image_table(tmp_path / "bytes" / "x.parquet", pa.array([b"a", None], kind), [0, 0])
        assert read_split(open_parquet_set(tmp_path / "bytes")) == [
            Record("x.parquet#0", b"a", 0),
            Record("x.parquet#1", None, 0, "the row has no image (null)"),
        ]


def test_too_large_image_has_reason_and_reads_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstlight.pipeline.data.sources.tables.table_rows.MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr("firstlight.pipeline.data.sources.parquet.MAX_READ_BYTES", 3000)
    write_image_table(
        tmp_path / "x.parquet",
        pa.array([bytes([k]) * size for k in range(5) for size in (1000, 1001, 999)], pa.binary()),
        [0] * 15,
    )
    asked: list[int] = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, count, **named: (asked.append(count), real(self, count, **named))[1],
    )
    found = read_split(open_parquet_set(tmp_path))
    assert [None if record.data is None else len(record.data) for record in found] == [1000, None, 999] * 5
    assert {record.reason for record in found} == {None, "has 1001 bytes (at most 536870912)"}
    assert set(asked) <= {1, 2, 3}


@pytest.mark.parametrize("others", [("test", "validation"), ("validation",), ("val",), ("test",), ()])
@pytest.mark.parametrize("form", ["{}-00000-of-00001.parquet", "cifar_{}.parquet", "default/{}/0000.parquet"])
def test_names_of_files_define_splits(tmp_path: Path, others: tuple[str, ...], form: str) -> None:
    for name in ("train", *others):
        write_image_table(tmp_path / form.format(name), [name.encode()] * 3, [0, 1, 1])
    source = open_parquet_set(tmp_path)
    assert source.splits == {
        split: 3
        for split in ("train", "val", "test")
        if split in {"train", *(n[:4] if n == "test" else "val" for n in others)}
    }
    for name in ("train", *others):
        split = name if name in ("train", "test") else "val"
        assert {record.data for record in read_split(source, split)} == {name.encode()}


def test_parts_cross_row_groups_and_files(tmp_path: Path) -> None:
    names = [f"{k:02d}" for k in range(25)]
    write_image_table(tmp_path / "train-0.parquet", [n.encode() for n in names[:11]], [0] * 11)  # row groups of 4
    write_image_table(tmp_path / "train-1.parquet", [n.encode() for n in names[11:]], [0] * 14)
    for rows in (1, 3, 5, 25):
        for fields in ({}, {"test_fraction": 0.3}):
            source = pickle.loads(pickle.dumps(open_parquet_set(tmp_path, **fields)))
            read = [record.data.decode() for part in source.split_into_parts(rows) for record in source.read(part)]
            assert sorted(read) == names
            train = read[: source.splits["train"]]
            assert train == sorted(train)
            assert len(train) == (25 if not fields else 17)


def test_text_labels_become_classes(tmp_path: Path) -> None:
    for labels in (["dog", None, "cat"], pa.array(["dog", None, "cat"]).dictionary_encode()):
        write_image_table(tmp_path / "x.parquet", [b"a", b"b", b"c"], labels)
        source = open_parquet_set(tmp_path)
        assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, -1, 0])


def test_null_label_column_gives_no_labels(tmp_path: Path) -> None:
    write_image_table(tmp_path / "x.parquet", [b"a"])
    source = open_parquet_set(tmp_path, label_column=None)
    assert (source.classes, source.labels.tolist()) == ((), [-1])
    write_image_table(tmp_path / "x.parquet", [b"a", b"b"], [-1, -1])
    assert open_parquet_set(tmp_path).classes == ()


def test_class_names_come_from_file_or_hugging_face(tmp_path: Path) -> None:
    write_image_table(tmp_path / "x.parquet", [b"a", b"b"], [1, 0])
    features = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
    written = pq.read_table(tmp_path / "x.parquet").replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(written, tmp_path / "x.parquet")
    assert open_parquet_set(tmp_path).classes == ("ant", "bee")
    before = open_parquet_set(tmp_path).fingerprint
    (tmp_path / "classes.txt").write_text("auk\nboa\ncow\n")
    assert open_parquet_set(tmp_path).classes == ("auk", "boa", "cow")
    assert open_parquet_set(tmp_path).fingerprint != before
    (tmp_path / "classes.txt").write_text("auk\n")
    with pytest.raises(
        UserError, match=r"x\.parquet: row 0: label 1 is out of range: .*classes\.txt has 1 classes; valid: 0 to 0"
    ):
        open_parquet_set(tmp_path)
    for text in ("a\na\n", "a\n\nb\n", ""):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=r"classes\.txt: must list every class once"):
            open_parquet_set(tmp_path)


@pytest.mark.fault(34, "label -2, and one of 10^15")
@pytest.mark.parametrize(
    ("labels", "text"), [([0, -2], "row 1: label -2"), ([10**15, 0], "row 0: label 1000000000000000")]
)
def test_label_without_class_raises(tmp_path: Path, labels: list[int], text: str) -> None:
    write_image_table(tmp_path / "train-0.parquet", [b"a"], [0])
    write_image_table(tmp_path / "train-1.parquet", [b"a", b"b"], labels)
    with pytest.raises(UserError, match=rf"train-1\.parquet: {text} is out of range"):
        open_parquet_set(tmp_path)


def test_mixed_label_types_raise(tmp_path: Path) -> None:
    write_image_table(tmp_path / "train-0.parquet", [b"a"], [0])
    write_image_table(tmp_path / "train-1.parquet", [b"a"], ["cat"])
    with pytest.raises(
        UserError,
        match=r"dataset\.label_column: 'label' has mixed types: text in .*train-1\.parquet, integers in .*train-0",
    ):
        open_parquet_set(tmp_path)


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
def test_missing_column_lists_columns(tmp_path: Path, fields: dict[str, str], key: str) -> None:
    write_image_table(tmp_path / "x.parquet", structs("a"), [0], score=[0.5])
    with pytest.raises(
        UserError,
        match=rf"dataset\.{key} .*x\.parquet; columns: image \(struct<.*>\), label \(int64\), score \(double\)",
    ):
        open_parquet_set(tmp_path, **fields)


def test_unreadable_file_raises(tmp_path: Path) -> None:
    write_image_table(tmp_path / "train-0.parquet", [b"a" * 100] * 8, [0] * 8)
    data = (tmp_path / "train-0.parquet").read_bytes()
    for text in (b"", b"nonsense" * 10, data[:-20]):
        (tmp_path / "train-1.parquet").write_bytes(text)
        with pytest.raises(UserError, match=r"train-1\.parquet: cannot be read as Parquet"):
            open_parquet_set(tmp_path)


def test_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    images = [os.urandom(100) for _ in range(12)]
    pq.write_table(
        pa.table({"image": images, "label": [0] * 12}),
        tmp_path / "x.parquet",
        row_group_size=4,
        write_page_checksum=True,
        write_statistics=False,
    )
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    source = open_parquet_set(tmp_path)
    data[data.index(images[5]) + 3] ^= 1  # in the second row group
    (tmp_path / "x.parquet").write_bytes(data)
    records = read_split(source)
    assert [record.data for record in records[:4]] == images[:4]
    assert len(records) == 12
    assert all(record.data is None and "x.parquet cannot be read" in str(record.reason) for record in records[4:8])
    assert [record.data for record in records[8:]] == images[8:]
    (tmp_path / "x.parquet").unlink()
    assert [(record.path, record.label) for record in read_split(source)] == [(f"x.parquet#{k}", 0) for k in range(12)]
    assert {record.reason for record in read_split(source)} == {
        f"x.parquet cannot be read: [Errno 2] Failed to open local file '{tmp_path}/x.parquet'. "
        "Detail: [errno 2] No such file or directory"
    }


@pytest.mark.fault(32, "Parquet without rows")
def test_file_without_rows_raises(tmp_path: Path) -> None:
    write_image_table(tmp_path / "train.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    with pytest.raises(UserError, match=r"dataset\.root: no rows in train\.parquet"):
        open_parquet_set(tmp_path)


def test_real_cifar10_is_read(cifar10: Path) -> None:
    source = open_parquet_set(cifar10)
    assert (source.splits, source.classes[0], len(source.classes)) == (
        {"train": 50_000, "test": 10_000},
        "airplane",
        10,
    )
    np.testing.assert_array_equal(np.bincount(source.labels[source.rows["test"]]), [1000] * 10)
    across = list(source.read(SourcePart("train", 12_498, 4)))  # over the seam of two files
    assert [record.path.split("#")[0][:11] for record in across] == ["train-00000"] * 2 + ["train-00001"] * 2
    assert {decode_rgb(record.data or b"").shape for record in across} == {(32, 32, 3)}


def encode(values: list[Any], kind: str) -> pa.Array:
    texts = [base64.b64encode(value).decode() for value in values]
    made: dict[str, Callable[[], pa.Array]] = {
        "binary_view": lambda: pa.array(values, pa.binary_view()),
        "large_binary": lambda: pa.array(values, pa.large_binary()),
        "dictionary": lambda: pa.array(values, pa.binary()).dictionary_encode(),
        "base64": lambda: pa.array(texts),
        "base64 view": lambda: pa.array(texts, pa.string_view()),
        "data URI": lambda: pa.array([f"data:image/png;base64,{text}" for text in texts]),
        "list of one": lambda: pa.array([[value] for value in values], pa.list_(pa.binary())),
        "list of one struct": lambda: pa.array([[{"bytes": value, "path": None}] for value in values]),
    }
    return made[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "binary_view",
        "large_binary",
        "dictionary",
        "base64",
        "base64 view",
        "data URI",
        "list of one",
        "list of one struct",
    ],
)
def test_images_of_every_type_are_read(tmp_path: Path, kind: str) -> None:
    images = [make_png(k) for k in range(5)]
    write_image_table(tmp_path / "x.parquet", encode(images, kind), [0, 1, 0, 1, 0])
    assert [record.data for record in read_split(open_parquet_set(tmp_path))] == images


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (pa.array([True, False, True]), ("False", "True"), [1, 0, 1]),
        (pa.array([Decimal("1.0"), Decimal("0.0"), None]), ("0", "1"), [1, 0, -1]),
        (pa.array([1.0, 0.0, float("nan")]), ("0", "1"), [1, 0, -1]),
        (pa.array(["b", "a", "NaN"], pa.string_view()), ("a", "b"), [1, 0, -1]),
        (pa.array([[1], [0], []]), ("0", "1"), [1, 0, -1]),
        (pa.array([2, 1, 3]), ("1", "2", "3"), [1, 0, 2]),
        (pa.array([None, None, None]), (), [-1, -1, -1]),
    ],
)
def test_labels_of_every_type_are_read(
    tmp_path: Path, labels: pa.Array, classes: tuple[str, ...], numbers: list[int]
) -> None:
    write_image_table(tmp_path / "x.parquet", [b"a", b"b", b"c"], labels)
    source = open_parquet_set(tmp_path)
    assert (source.classes, source.labels.tolist()) == (classes, numbers)


def test_text_that_is_no_image_is_refused_at_once(tmp_path: Path) -> None:
    write_image_table(tmp_path / "x.parquet", ["im/0.jpg", "im/1.jpg"], [0, 1])
    with pytest.raises(
        UserError, match=r"dataset\.image_column: 'image' of .* is text, but no image in Base64 .*source: list"
    ):
        open_parquet_set(tmp_path)


def test_other_names_of_columns_are_taken_and_reported(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [b"a", b"b"], "fine": [1, 2], "Label": ["x", "y"]}), tmp_path / "x.parquet")
    source = open_parquet_set(tmp_path)
    assert source.classes == ("x", "y")
    assert source.notes[:2] == (
        "dataset.image_column: there is no 'image', 'img' is taken",
        "dataset.label_column: there is no 'label', 'Label' is taken",
    )


def test_test_file_without_labels_leaves_validation_to_test_on(tmp_path: Path) -> None:
    for name, labels in (("train", [0, 1, 1]), ("validation", [1, 0, 1]), ("test", [-1, -1, -1])):
        write_image_table(tmp_path / f"{name}-0.parquet", [name.encode()] * 3, labels)
    source = open_parquet_set(tmp_path)
    assert source.splits == {"train": 3, "test": 3}
    assert {record.data for record in read_split(source, "test")} == {b"validation"}
    assert source.notes[1] == "the held-out split is tested on, as the test split has no labels: 3 images"
    assert source.reading[0] == "read 6 rows, left out 0 of 3 files"

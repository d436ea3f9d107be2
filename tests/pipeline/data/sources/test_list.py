"""A list of image files: formats, labels, splits, and rows that cannot be read."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.manifest import QUARANTINE_FILE
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import (
    dataset_options,
    list_labels,
    make_png,
    open_list_set,
    prepare_store,
    read_split,
    write_csv,
    write_named_files,
)


def reasons(source: Source) -> dict[str, str | None]:
    return {record.path: record.reason for record in read_split(source)}


def test_csv_with_byte_order_mark_and_quotes(tmp_path: Path) -> None:
    write_named_files(tmp_path, 'a, "b".jpg', "sub/c\nd.jpg", "é.jpg")
    file = write_csv(
        tmp_path, '\ufefflabel,path,more\r\ndog,"a, ""b"".jpg",1\r\n"cat, big","sub/c\nd.jpg",2\r\n,é.jpg,3\r\n'
    )
    source = pickle.loads(pickle.dumps(open_list_set(file)))
    assert (source.classes, source.splits) == (("cat, big", "dog"), {"train": 3})
    assert list_labels(source) == [('a, "b".jpg', 1), ("sub/c\nd.jpg", 0), ("é.jpg", -1)]
    assert [record.data for record in read_split(source)] == [b'a, "b".jpg', b"sub/c\nd.jpg", "é.jpg".encode()]


@pytest.mark.parametrize("suffix", [".csv", ".TSV", ".jsonl", ".ndjson", ".parquet"])
@pytest.mark.parametrize("labels", [[2, 0, None], ["b", "a", None]])
def test_all_formats_give_same_rows(tmp_path: Path, suffix: str, labels: list[Any]) -> None:
    write_named_files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    rows = [{"file": f"{k}.jpg", "kind": label} for k, label in enumerate(labels, 1)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    elif "json" in suffix:
        write_csv(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), f"list{suffix}")
    else:
        mark = "," if suffix == ".csv" else "\t"
        table = [("file", "kind"), *(row.values() for row in rows)]
        write_csv(
            tmp_path,
            "\n".join(mark.join("" if value is None else str(value) for value in row) for row in table),
            f"list{suffix}",
        )
    source = open_list_set(tmp_path / f"list{suffix}", path_column="file", label_column="kind")
    assert (source.classes, source.labels.tolist()) == (
        (("0", "1", "2"), [2, 0, -1]) if labels[0] == 2 else (("a", "b"), [1, 0, -1])
    )
    assert [record.data for record in read_split(source)] == [b"1.jpg", b"2.jpg", b"3.jpg"]


def test_paths_are_relative_to_root_or_list_folder(tmp_path: Path) -> None:
    write_named_files(tmp_path / "images", "1.jpg")
    file = write_csv(write_named_files(tmp_path / "lists", "1.jpg"), "path\n1.jpg\n")
    assert read_split(open_list_set(file, root=tmp_path / "images", label_column=None))[0].data == b"1.jpg"
    file.with_name("1.jpg").write_bytes(b"beside the list")
    assert read_split(open_list_set(file, label_column=None))[0].data == b"beside the list"


@pytest.mark.parametrize(
    ("others", "test"), [(["test", "val"], "test"), (["val"], "val"), (["validation"], "validation"), ([], None)]
)
def test_split_column_defines_splits(tmp_path: Path, others: list[str], test: str | None) -> None:
    rows = [f"{split}/{k}.jpg,{split},{k}" for split in ["train", *others] for k in range(2)]
    source = open_list_set(
        write_csv(tmp_path, "\n".join(["path,part,label", *rows])), split_column="part", test_fraction=0.0
    )
    assert list_labels(source) == [("train/0.jpg", 0), ("train/1.jpg", 1)]
    assert source.splits == ({"train": 2, "test": 2} if test else {"train": 2})
    if test:
        assert list_labels(source, "test") == [(f"{test}/0.jpg", 0), (f"{test}/1.jpg", 1)]


def test_unused_val_rows_are_noted(tmp_path: Path) -> None:
    write_named_files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    file = write_csv(tmp_path, "path,split\n1.jpg,train\n2.jpg,test\n3.jpg,val\n")
    source = open_list_set(file, label_column=None, split_column="split")
    assert (source.splits, source.unread_note) == (
        {"train": 1, "test": 1},
        "not read, as others are marked test: 1 rows that are marked val",
    )


def test_invalid_split_names_row_and_valid_splits(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "path,part,label\na.jpg,train,0\nb.jpg,dev,0\n")
    with pytest.raises(
        UserError, match=r"list\.csv: row 1: part 'dev' is no split; valid: train, test, val, validation$"
    ):
        open_list_set(file, split_column="part")
    with pytest.raises(UserError, match=r"dataset\.split_column: no row of .*list\.csv is marked train in 'part'$"):
        open_list_set(write_csv(tmp_path, "path,part,label\na.jpg,test,0\n"), split_column="part")
    with pytest.raises(UserError, match=r"row 0: part None is no split"):
        open_list_set(write_csv(tmp_path, "path,part,label\na.jpg,,0\n"), split_column="part")


@pytest.mark.fault(34, "labels that are no class")
def test_label_without_class_raises(tmp_path: Path) -> None:
    write_named_files(tmp_path, "1.jpg").joinpath("classes.txt").write_text("ant\nbee\n")
    assert open_list_set(write_csv(tmp_path, "path,label\n1.jpg,bee\n")).labels.tolist() == [1]
    assert open_list_set(write_csv(tmp_path, "path,label\n1.jpg,1\n")).labels.tolist() == [1]
    for label, text in (
        ("cow", "label 'cow' .* valid: ant, bee"),
        ("2", "label 2 .* valid: 0 to 1"),
        ("-2", "label -2 is out of range"),
    ):
        with pytest.raises(UserError, match=rf"list\.csv: row 1: {text}"):
            open_list_set(
                write_csv(
                    tmp_path,
                    f"path,label\n1.jpg,0\n2.jpg,{label}\n" if label != "cow" else "path,label\n1.jpg,ant\n2.jpg,cow\n",
                )
            )


@pytest.mark.fault(54, "rows that lead out of the root")
def test_unreadable_rows_have_reasons(tmp_path: Path) -> None:
    root = write_named_files(tmp_path / "root", "1.jpg", "sub/2.jpg")
    write_named_files(tmp_path / "outside", "secret.jpg")
    os.symlink(tmp_path / "outside", root / "link")
    os.symlink("../1.jpg", root / "sub" / "in.jpg")
    os.mkfifo(root / "pipe.jpg")
    absolute = str(tmp_path / "outside" / "secret.jpg")
    names = [
        "1.jpg",
        "none.jpg",
        "../outside/secret.jpg",
        "sub/../../x",
        "link/secret.jpg",
        "pipe.jpg",
        "1.jpg",
        "sub/in.jpg",
        absolute,
    ]
    names += [f"file://{absolute}", "ftp://host/x.jpg", "sub", '""', "zero\0.jpg"]
    source = open_list_set(write_csv(root, "\n".join(["path,label", *(f"{name},0" for name in names)])))
    found = read_split(source)
    assert [record.data for record in found if record.data is not None] == [
        b"1.jpg",
        b"1.jpg",
        b"secret.jpg",
        b"secret.jpg",
    ]
    assert [(record.path, record.reason) for record in found if record.reason is not None] == [
        ("none.jpg", "No such file or directory"),
        ("../outside/secret.jpg", "path leaves the root"),
        ("sub/../../x", "path leaves the root"),
        ("link/secret.jpg", "link leaves the root"),
        ("pipe.jpg", "is no file but a pipe, socket or device"),
        ("1.jpg", "is listed twice"),
        (
            "ftp://host/x.jpg",
            "'ftp://host/x.jpg': ftp:// is unknown; valid: a path, or file://, gs://, http://, https://, memory://, "
            "s3://",
        ),
        ("sub", "Is a directory"),
        ("row 12", "the row has no path"),
        ("zero\0.jpg", "lstat: embedded null character in path"),
    ]


@pytest.mark.fault(35, "one file by several paths")
def test_paths_of_one_file_are_duplicates(tmp_path: Path) -> None:
    root = write_named_files(tmp_path / "root", "1.jpg", "sub/2.jpg")
    names = [
        "1.jpg",
        "./1.jpg",
        "sub/../1.jpg",
        ".//1.jpg",
        str(root / "1.jpg"),
        "sub//2.jpg",
        "sub/2.jpg",
        "a..b/1.jpg",
        "memory://b/./1.jpg",
    ]
    found = read_split(open_list_set(write_csv(root, "\n".join(["path,label", *(f"{name},0" for name in names)]))))
    assert [record.path for record in found if record.reason == "is listed twice"] == [*names[1:5], names[6]]


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    (tmp_path / "list.csv").write_bytes(b"path\ncaf\xe9.jpg\n")
    assert [(r.path, r.data) for r in read_split(open_list_set(tmp_path / "list.csv", label_column=None))] == [
        ("caf\\udce9.jpg", b"x")
    ]


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("x.csv", b"path,label\n", "dataset.list: no rows in .*x.csv"),
        ("x.csv", b"", "dataset.list: .*x.csv: cannot be read: Empty CSV file"),
        (
            "x.csv",
            b"path,label\na.jpg\n",
            "dataset.list: .*x.csv: cannot be read: CSV parse error: Row #2: Expected 2 columns, got 1",
        ),
        (
            "x.jsonl",
            b'{"path": "a',
            "dataset.list: .*x.jsonl: cannot be read: row 0 is no JSON object on a line of its own",
        ),
        ("x.jsonl", b'{"path": 1e}', "dataset.list: .*x.jsonl: cannot be read: JSON parse error"),
        ("x.parquet", b"PAR1", "dataset.list: .*x.parquet: cannot be read"),
        ("x.txt", b"a.jpg", "dataset.list: .*x.txt' is of no known format; valid: a file that ends in .csv, .tsv"),
    ],
)
def test_invalid_list_raises_one_line(tmp_path: Path, name: str, data: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=text) as caught:
        open_list_set(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_list_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.list: .*none\.csv: cannot be read: No such file"):
        open_list_set(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"dataset\.list: 'ftp://host/x\.csv': ftp:// is unknown"):
        open_source(dataset_options(source="list", list="ftp://host/x.csv"))
    with pytest.raises(ValueError, match=r"'list' takes dataset\.list"):
        dataset_options(source="list", root=tmp_path)
    with pytest.raises(ValueError, match=r"'folder' takes no dataset\.list"):
        dataset_options(source="folder", root=tmp_path, list="x.csv")


def test_fingerprint_changes_with_list_and_images(tmp_path: Path) -> None:
    file = write_csv(write_named_files(tmp_path, "a.jpg", "b.jpg"), "path,label,more\na.jpg,0,b.jpg\n")
    seen = {open_list_set(file).fingerprint, open_list_set(file, path_column="more").fingerprint}
    os.utime(file, (1, 1))
    assert open_list_set(file).fingerprint in seen  # the same list, copied anew
    os.utime(tmp_path / "a.jpg", (1, 1))
    seen.add(open_list_set(file).fingerprint)
    (tmp_path / "a.jpg").unlink()
    seen.add(open_list_set(file).fingerprint)
    seen.add(open_list_set(write_csv(tmp_path, "path,label,more\na.jpg,1,b.jpg\n")).fingerprint)
    assert len(seen) == 5


def test_list_is_prepared_as_store(tmp_path: Path) -> None:
    for k in range(20):
        (tmp_path / f"{k}.png").write_bytes(make_png(k))
    rows = [f"{k}.png,{'odd' if k % 2 else 'even'},{'test' if k >= 16 else 'train'}" for k in range(20)]
    file = write_csv(tmp_path, "\n".join(["path,label,part", *rows, "none.png,odd,train"]))
    store = prepare_store(dataset_options(source="list", list=file, split_column="part"), tmp_path / "stores")
    assert (store.classes, store.quarantined, store.splits) == (
        ("even", "odd"),
        1,
        {"train": 16, "test": 4},
    )
    assert store.labels("test").tolist() == [0, 1, 0, 1]
    assert pq.read_table(store.path / QUARANTINE_FILE).to_pylist() == [
        {"path": "none.png", "split": "train", "reason": "No such file or directory"}
    ]

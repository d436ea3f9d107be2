"""A list of image files: formats, labels, splits, and rows that cannot be read."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
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
from tests.support.presence import read_presence


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
        (("0", "2"), [1, 0, -1]) if labels[0] == 2 else (("a", "b"), [1, 0, -1])
    )
    assert [record.data for record in read_split(source)] == [b"1.jpg", b"2.jpg", b"3.jpg"]


def test_paths_are_relative_to_root_or_list_folder(tmp_path: Path) -> None:
    write_named_files(tmp_path / "images", "1.jpg")
    file = write_csv(write_named_files(tmp_path / "lists", "1.jpg"), "path\n1.jpg\n")
    assert read_split(open_list_set(file, root=tmp_path / "images", label_column=None))[0].data == b"1.jpg"
    file.with_name("1.jpg").write_bytes(b"beside the list")
    assert read_split(open_list_set(file, label_column=None))[0].data == b"beside the list"


@pytest.mark.parametrize("others", [["test", "val"], ["val"], ["validation"], ["Dev Set"], []])
def test_split_column_defines_splits(tmp_path: Path, others: list[str]) -> None:
    rows = [f"{split}/{k}.jpg,{split},{k}" for split in ["train", *others] for k in range(2)]
    write_named_files(tmp_path, *(row.split(",")[0] for row in rows))
    source = open_list_set(
        write_csv(tmp_path, "\n".join(["path,part,label", *rows])), split_column="part", test_fraction=0.0
    )
    assert list_labels(source) == [("train/0.jpg", 0), ("train/1.jpg", 1)]
    assert source.splits == {"train": 2, **{"test" if name == "test" else "val": 2 for name in others}}
    for name in others:
        found = list_labels(source, "test" if name == "test" else "val")
        assert found == [(f"{name}/0.jpg", 0), (f"{name}/1.jpg", 1)]


def test_invalid_split_names_row_and_valid_splits(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "path,part,label\na.jpg,train,0\nb.jpg,fold 2,0\n")
    with pytest.raises(
        UserError, match=r"list\.csv: row 1: 'part' 'fold 2' is no name of a split; values: train, fold 2;"
    ):
        open_list_set(file, split_column="part")
    with pytest.raises(
        UserError, match=r"dataset\.split_column: no row of .*list\.csv is of the training split; values: t"
    ):
        open_list_set(write_csv(tmp_path, "path,part,label\na.jpg,test,0\n"), split_column="part")
    with pytest.raises(UserError, match=r"list\.csv: 2 rows without a split in 'part', the first is row 0; valid: "):
        open_list_set(write_csv(tmp_path, "path,part,label\na.jpg,,0\nb.jpg,train,0\nc.jpg,,0\n"), split_column="part")


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
        (
            "ftp://host/x.jpg",
            "'ftp://host/x.jpg': ftp:// is unknown; valid: a path, or az://, file://, gs://, hf://, http://, "
            "https://, memory://, s3://",
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
    source = open_list_set(write_csv(root, "\n".join(["path,label", *(f"{name},0" for name in names)])))
    assert [record.path for record in read_split(source)] == [names[0], names[5], *names[7:]]
    assert source.reading[0] == "read 4 rows, left out 5: of an image that stands in an earlier row 5"


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
    assert open_list_set(file).fingerprint in seen  # the same list, copied again
    os.utime(tmp_path / "a.jpg", (1, 1))
    seen.add(open_list_set(file).fingerprint)
    (tmp_path / "a.jpg").write_bytes(b"other")
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


def write_images(folder: Path) -> Path:
    return write_named_files(folder, *(f"im/{k}.jpg" for k in range(4)))


TABLES = {
    "semicolon": b"path;label\nim/0.jpg;cat\nim/1.jpg;dog\nim/2.jpg;cat\nim/3.jpg;dog\n",
    "tabs": b"path\tlabel\nim/0.jpg\tcat\nim/1.jpg\tdog\nim/2.jpg\tcat\nim/3.jpg\tdog\n",
    "space after comma": b"path, label\nim/0.jpg, cat\nim/1.jpg, dog\nim/2.jpg, cat\nim/3.jpg, dog\n",
    "UTF-16": "path,label\nim/0.jpg,cat\nim/1.jpg,dog\nim/2.jpg,cat\nim/3.jpg,dog\n".encode("utf-16"),
    "capitals": b"Path,LABEL\nim/0.jpg,cat\nim/1.jpg,dog\nim/2.jpg,cat\nim/3.jpg,dog\n",
    "no header": b"im/0.jpg,cat\nim/1.jpg,dog\nim/2.jpg,cat\nim/3.jpg,dog\n",
    "no header, labels first": b"cat;im/0.jpg\ndog;im/1.jpg\ncat;im/2.jpg\ndog;im/3.jpg\n",
    "no header, index": b"0,im/0.jpg,cat\n1,im/1.jpg,dog\n2,im/2.jpg,cat\n3,im/3.jpg,dog\n",
    "index with a name": b",path,label\n0,im/0.jpg,cat\n1,im/1.jpg,dog\n2,im/2.jpg,cat\n3,im/3.jpg,dog\n",
    "index without a name": b"path,label\n0,im/0.jpg,cat\n1,im/1.jpg,dog\n2,im/2.jpg,cat\n3,im/3.jpg,dog\n",
    "usual names": b"filename,class\nim/0.jpg,cat\nim/1.jpg,dog\nim/2.jpg,cat\nim/3.jpg,dog\n",
    "comment mark": b"#image_path,category\nim/0.jpg,cat\nim/1.jpg,dog\nim/2.jpg,cat\nim/3.jpg,dog\n",
    "Windows": b"path,label\r\nim\\0.jpg,cat\r\nim\\1.jpg,dog\r\nim\\2.jpg,cat\r\nim\\3.jpg,dog\r\n",
    "Excel": b"sep=;\r\npath;label\r\nim/0.jpg;cat\r\nim/1.jpg;dog\r\nim/2.jpg;cat\r\nim/3.jpg;dog\r\n",
}
# The separators of those without commas.
SEPARATORS = {
    "semicolon": "semicolon",
    "tabs": "tab",
    "space after comma": "comma and space",
    "no header, labels first": "semicolon",
    "Excel": "semicolon",
}
# Others have no note.
FIRST_NOTES = {
    "capitals": "dataset.path_column: there is no 'path', 'Path' is taken",
    "no header": "no header: the first row is im/0.jpg, cat; columns are called 0, 1, ...",
    "no header, labels first": "no header: the first row is cat, im/0.jpg; columns are called 0, 1, ...",
    "no header, index": "no header: the first row is 0, im/0.jpg, cat; columns are called 0, 1, ...",
    "index without a name": "the first column has no name: taken as an index",
    "usual names": "dataset.path_column: there is no 'path', 'filename' is taken",
    "comment mark": "dataset.path_column: there is no 'path', '#image_path' is taken",
    "Windows": "4 paths read with / for \\",
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_that_people_write_are_read_and_reported(tmp_path: Path, kind: str, suffix: str) -> None:
    (write_images(tmp_path) / f"list{suffix}").write_bytes(TABLES[kind])
    source = open_list_set(tmp_path / f"list{suffix}")
    assert list_labels(source) == [("im/0.jpg", 0), ("im/1.jpg", 1), ("im/2.jpg", 0), ("im/3.jpg", 1)]
    assert source.classes == ("cat", "dog")
    assert [record.data for record in read_split(source)] == [f"im/{k}.jpg".encode() for k in range(4)]
    form = f"{SEPARATORS.get(kind, 'comma')}, encoding {'utf-16' if kind == 'UTF-16' else 'utf-8'}"
    usual = {".csv": "comma, encoding utf-8", ".tsv": "tab, encoding utf-8"}[suffix]
    told = [line for line in source.reading if line.startswith("columns are separated by ")]
    assert told == ([] if form == usual else [f"columns are separated by {form}"])
    assert "".join(source.notes[:1]) == FIRST_NOTES.get(kind, "")


def test_latin_1_labels_are_read_and_reported(tmp_path: Path) -> None:
    text = "path;label\nim/0.jpg;Käse\nim/1.jpg;Brötchen\nim/2.jpg;Käse\nim/3.jpg;Müsli\n"
    (write_images(tmp_path) / "list.csv").write_bytes(text.encode("latin-1"))
    source = open_list_set(tmp_path / "list.csv")
    assert source.classes == ("Brötchen", "Käse", "Müsli")
    assert source.reading[0] == "columns are separated by semicolon, encoding cp1252"
    assert source.notes[0].startswith("encoding cp1252, guessed, as the text is not UTF-8: Käse, Brötchen, Müsli; dat")
    assert open_list_set(tmp_path / "list.csv", encoding="mac_roman").classes != source.classes
    with pytest.raises(ValueError, match="'nonsense' is no encoding that Python knows"):
        open_list_set(tmp_path / "list.csv", encoding="nonsense")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "im/0.jpg,cat,old\nim/1.jpg,dog,new\n",
            r"dataset\.label_column: 'label' is no column of .*; columns: 0 .*1 .*2 ",
        ),
        (
            "id,breed\nim/0.jpg,cat\n",
            r"dataset\.path_column: 'path' is no column of text .*; columns: id \(text\), breed",
        ),
        (
            "file,image,label\nim/0.jpg,im/0.jpg,cat\n",
            r"dataset\.path_column: 'path' is no column of text .*; columns: file",
        ),
    ],
)
def test_unclear_columns_are_listed_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_list_set(write_csv(write_images(tmp_path), text))


def test_columns_without_header_are_chosen_by_number(tmp_path: Path) -> None:
    file = write_csv(write_images(tmp_path), "im/0.jpg,cat,old\nim/1.jpg,dog,new\n")
    assert open_list_set(file, path_column="0", label_column="2").classes == ("new", "old")


def test_missing_and_twin_labels_are_reported(tmp_path: Path) -> None:
    file = write_csv(write_images(tmp_path), "path,label\nim/0.jpg,cat \nim/1.jpg,NaN\nim/2.jpg,Cat\nim/3.jpg,\n")
    source = open_list_set(file)
    assert (source.classes, source.labels.tolist()) == (("Cat", "cat"), [1, -1, 0, -1])
    assert any(note.startswith("no label: 2 images ('NaN' 1, empty 1)") for note in source.notes)
    assert any(note.startswith("classes that look alike") for note in source.notes)
    assert open_list_set(file, label_case="lower").labels.tolist() == [0, -1, 0, -1]


def test_whole_floats_are_numbers_of_listed_classes(tmp_path: Path) -> None:
    (write_images(tmp_path) / "classes.txt").write_text("ant\nbee\n")
    source = open_list_set(write_csv(tmp_path, "path,label\nim/0.jpg,0.0\nim/1.jpg,1.0\n"))
    assert (source.classes, source.labels.tolist()) == (("ant", "bee"), [0, 1])


def test_split_column_is_found_by_its_name_and_values(tmp_path: Path) -> None:
    file = write_csv(
        write_images(tmp_path),
        "path,label,Subset\nim/0.jpg,a,Train\nim/1.jpg,b,train\nim/2.jpg,a,Test\nim/3.jpg,b,valid\n",
    )
    source = open_list_set(file)
    assert source.splits == {"train": 2, "val": 1, "test": 1}
    assert "the column 'Subset' is read as the splits; dataset.splits={} ignores it" in source.notes
    assert open_list_set(file, splits={}).splits == {"train": 4}
    other = write_csv(tmp_path, "path,label,fold\nim/0.jpg,a,1\nim/1.jpg,b,2\n")
    assert open_list_set(other).splits == {"train": 2}
    given = open_list_set(other, split_column="fold", splits={"train": 1, "test": 2})
    assert given.splits == {"train": 1, "test": 1}


def test_image_with_two_labels_is_a_conflict_or_has_both(tmp_path: Path) -> None:
    file = write_csv(write_images(tmp_path), "path,label\nim/0.jpg,cat\nim/1.jpg,dog\nim/0.jpg,dog\n")
    with pytest.raises(
        UserError, match=r"row 0 and row 2: im/0\.jpg is 'cat' and 'dog' .*dataset\.annotations=\[present\]"
    ):
        open_list_set(file)
    source = open_list_set(file, annotations=["present"])
    assert (source.classes, source.annotations, source.splits) == (("cat", "dog"), ("present",), {"train": 2})
    found = [(record.path, record.annotation.present.tolist()) for record in read_split(source) if record.annotation]
    assert found == [("im/0.jpg", [1, 1]), ("im/1.jpg", [0, 1])]


def test_lists_of_labels_are_labels_of_one_image(tmp_path: Path) -> None:
    rows = [
        {"path": "im/0.jpg", "label": ["cat", "dog"]},
        {"path": "im/1.jpg", "label": []},
        {"path": "im/2.jpg", "label": ["dog"]},
    ]
    file = write_csv(write_images(tmp_path), "".join(json.dumps(row) + "\n" for row in rows), "list.jsonl")
    with pytest.raises(UserError, match=r"holds several labels in row 0: .*dataset\.annotations=\[present\]"):
        open_list_set(file)
    source = open_list_set(file, annotations=["present"])
    assert [record.annotation.present.tolist() for record in read_split(source) if record.annotation] == [
        [1, 1],
        [-1, -1],
        [0, 1],
    ]


def test_list_with_several_labels_is_prepared_as_store(tmp_path: Path) -> None:
    for k in range(8):
        (tmp_path / f"{k}.png").write_bytes(make_png(k))
    rows = [f"{k}.png,{'odd' if k % 2 else 'even'}" for k in range(8)] + [f"{k}.png,small" for k in range(3)]
    file = write_csv(tmp_path, "\n".join(["path,label", *rows]))
    data = dataset_options(source="list", list=file, annotations=["present"], test_fraction=0.25)
    store = prepare_store(data, tmp_path / "stores")
    assert (store.classes, store.annotations, store.splits) == (
        ("even", "odd", "small"),
        ("present",),
        {"train": 6, "test": 2},
    )
    together = np.concatenate([read_presence(store, "train"), read_presence(store, "test")])
    assert together.sum(0).tolist() == [4, 4, 3]

"""Folders, lists, tables and archives as people have them: read and told, or refused in one line with what settles it.

Each row is an input, the numbers of images of each class by split that the store has (None if it is refused), and texts
that are among the lines of the terminal, the report and the manifest.
"""

import base64
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.support.odd_images import encode_image, make_noise
from tests.support.odd_sources import (
    NUM_ROWS,
    WriteCase,
    archive_case,
    folders_case,
    list_case,
    list_rows,
    read_case,
    table_case,
    write_images,
)
from tests.support.webdataset_shards import make_special_member

LABELS = ["ant", "bee"] * 4
TWO, HALF = {"ant": 6, "bee": 6}, {"ant": 5, "bee": 5}


def alternate(k: int) -> str:
    return ("ant", "bee")[k % 2]


def write_loops(root: Path) -> dict[str, Any]:
    write_images(root, "ant", "bee")
    (root / "ant" / "up").symlink_to(root)
    return {"root": root, "follow_links": True}


def write_split_link(root: Path) -> dict[str, Any]:
    write_images(root, "set/train/ant", "set/train/bee", "other/ant", "other/bee")
    (root / "set" / "test").symlink_to(root / "other")
    return {"root": root / "set"}


def write_unreadable_class(root: Path) -> dict[str, Any]:
    write_images(root, "ant", "bee", "cow")
    for file in (root / "cow").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    return {"root": root}


def write_stray(root: Path) -> dict[str, Any]:
    write_images(root, "train/ant", "train/bee", "test/ant", "test/bee")
    (root / "train" / "cover.png").write_bytes(encode_image(make_noise(8, 8, 9)))
    return {"root": root}


def write_empty_class(root: Path) -> dict[str, Any]:
    write_images(root, "train/ant", "train/bee", "test/ant")
    (root / "test" / "bee").mkdir()
    return {"root": root}


def split_folders(train: str, test: str, *more: str, **fields: Any) -> WriteCase:
    folders = (f"{split}/{kind}" for split in (train, test) for kind in ("ant", "bee"))
    return folders_case(*folders, *more, **fields)


FOLDERS: dict[str, tuple[WriteCase, dict[str, dict[str, int]] | None, tuple[str, ...]]] = {
    "sets in a folder": (
        split_folders("data/Training_set", "data/Testing_set"),
        {"train": TWO, "test": TWO},
        ("are all in data, which is looked through", "training = data/Training_set; test = data/Testing_set"),
    ),
    "folder in itself, system folder": (
        split_folders("x/x/train", "x/x/test", "x/__MACOSX/train/ant"),
        {"train": TWO, "test": TWO},
        ("left out 6: in __MACOSX 6", "are all in x/x, which is looked through"),
    ),
    "set beside its copy": (
        split_folders("train", "test", "copy/train/ant"),
        {"train": TWO, "test": TWO},
        ("left out 6: images outside of the splits 6", "not read, outside of the splits: copy"),
    ),
    "odd case": (
        split_folders("tRaIn", "Test-Images"),
        {"train": TWO, "test": TWO},
        ("splits: training = tRaIn; test = Test-Images",),
    ),
    "words with a prefix": (
        split_folders("seg_train/seg_train", "seg_test/seg_test", "seg_pred/seg_pred"),
        {"train": TWO, "test": TWO},
        ("seg_train are all in seg_train/seg_train", "not read, outside of the splits: seg_pred"),
    ),
    "parts of a split": (
        folders_case("train_clean/ant", "train_noisy/ant", "test/ant"),
        None,
        ("valid: dataset.splits={train: [train_clean, train_noisy], test: test} (a split)",),
    ),
    "unknown word": (folders_case("training/ant", "pruefung/ant"), None, ("dataset.splits={train: training}",)),
    "class called validation": (
        folders_case("approval", "validation", "rejection"),
        None,
        ("the folder 'validation' stands beside approval, rejection: a split, or a class?",),
    ),
    "classes that differ in case": (
        folders_case("train/Ant", "train/Bee", "test/ant", "test/bee"),
        None,
        ("no class 'ant'; 'Ant' is one: dataset.label_case=lower reads both alike",),
    ),
    "classes that differ in case, as one": (
        folders_case("train/Ant", "train/Bee", "test/ant", "test/bee", label_case="lower"),
        {"train": TWO, "test": TWO},
        ("folders read as one class: 'Ant' and 'ant', 'Bee' and 'bee'",),
    ),
    "class of the tests only": (
        folders_case("train/ant", "train/bee", "test/cow"),
        None,
        ("the training split has no class 'cow'; its classes: ant, bee; valid: the same classes",),
    ),
    "stray image": (
        write_stray,
        {"train": {}, "test": {}},
        ("the training split has no labels, as 1 images lie beside the folders ant, bee: train/cover.png",),
    ),
    "class without an image": (
        write_empty_class,
        {"train": TWO, "test": {"ant": 6}},
        ("folders without an image: test/bee", "classes without an image to test on: bee"),
    ),
    "class without a readable image": (
        write_unreadable_class,
        {"train": HALF, "test": {"ant": 1, "bee": 1}},
        ("train: no image can be decoded of cow", "test: no image can be decoded of cow", "6 truncated"),
    ),
    "loop of links": (
        write_loops,
        {"train": HALF, "test": {"ant": 1, "bee": 1}},
        ("ant/up; their folders are read already",),
    ),
    "split that is a link": (write_split_link, None, ("set/test' is a link; valid: dataset.follow_links=true",)),
}


LISTS: dict[str, tuple[WriteCase, dict[str, dict[str, int]] | None, tuple[str, ...]]] = {
    "byte order mark and semicolons": (
        list_case(b"\xef\xbb\xbf" + list_rows(alternate, ";").encode()),
        {"train": HALF},
        ("separated by semicolon, encoding utf-8-sig",),
    ),
    "UTF-16 without a mark": (
        list_case(list_rows(alternate).encode("utf-16-be")),
        {"train": HALF},
        ("encoding utf-16-be, as every other byte is 0",),
    ),
    "Shift-JIS": (
        list_case(list_rows(lambda k: ("猫です", "犬の写真")[k % 2]).encode("shift_jis")),
        {"train": {"猫です": 5, "犬の写真": 5}},
        ("encoding cp932, guessed, as the text is not UTF-8: 猫です, 犬の写真; dataset.encoding settles it",),
    ),
    "breaks of lines in quotes": (
        list_case("path,label,note\n" + "".join(f'im/{k}.png,{alternate(k)},"a\nb ""c"""\n' for k in range(NUM_ROWS))),
        {"train": HALF},
        ("columns read: path, label; left out: note",),
    ),
    "comment before the header": (
        list_case("# exported\r\n" + list_rows(alternate).replace("\n", "\r\n")),
        {"train": HALF},
        ("1 line before the header left out, beginning with #",),
    ),
    "rows twice": (
        list_case(list_rows(alternate) + list_rows(alternate, header="")),
        {"train": HALF},
        ("read 12 rows, left out 12: of an image that stands in an earlier row 12", "ant 5, bee 5"),
    ),
    "index": (
        list_case(",path,label\n" + "".join(f"{k},im/{k}.png,{alternate(k)}\n" for k in range(NUM_ROWS))),
        {"train": HALF},
        ("columns read: path, label; left out: one without a name",),
    ),
    "labels that are none": (
        list_case(list_rows(lambda k: ("ant", "NaN", "", "bee")[k % 4])),
        {"train": {"ant": 2, "bee": 2}},
        ("no label: 6 images ('NaN' 3, empty 3); dataset.missing_labels=[] reads such texts as classes",),
    ),
    "-1": (list_case(list_rows(lambda k: k % 3 - 1)), {"train": {"0": 3, "1": 3}}, ("no label: 4 images (-1 4)",)),
    "numbers of images": (
        list_case(list_rows(lambda k: 1_000_000 + k)),
        None,
        ("row 0: label 1000000 is out of range; valid: 0 to 999999, or -1 (unknown)",),
    ),
    "two columns of labels": (
        list_case("path,category,class\n" + "".join(f"im/{k}.png,a,b\n" for k in range(NUM_ROWS))),
        None,
        ("dataset.label_column: 'label' is no column of integers or text", "category (text), class (text)"),
    ),
    "a column for each class": (
        list_case("path,ant,bee\n" + "".join(f"im/{k}.png,1,0\n" for k in range(NUM_ROWS))),
        None,
        ("dataset.label_column: 'label' is no column", "ant (text), bee (text); null: no labels"),
    ),
    "no labels": (
        list_case("path\n" + "".join(f"im/{k}.png\n" for k in range(NUM_ROWS)), label_column=None),
        {"train": {}},
        ("no labels",),
    ),
    "a column more": (
        list_case(list_rows(alternate) + "im/0.png,ant,more\n"),
        None,
        ("Row #14: Expected 2 columns, got 3",),
    ),
    "names without endings": (
        list_case(list_rows(alternate, path="im/{}")),
        {"train": HALF},
        ("12 paths read with the ending .png",),
    ),
    "numbers of folds": (
        list_case(
            "path,label,fold\n" + "".join(f"im/{k}.png,{alternate(k)},{k % 3}\n" for k in range(NUM_ROWS)),
            split_column="fold",
        ),
        None,
        ("row 0: 'fold' '0' is no name of a split; values: 0, 1, 2; valid: ", "dataset.splits="),
    ),
    "files that are missing": (
        list_case(list_rows(alternate) + "im/none.png,ant\n../x.png,bee\n"),
        {"train": {"ant": 5, "bee": 6}},
        ("2 images cannot be decoded (2 not read), listed in ",),
    ),
    "escapes of a terminal": (
        list_case(list_rows(lambda k: ("a\x1b[31m", "b\u202e")[k % 2])),
        {"train": {"a\x1b[31m": 5, "b\u202e": 5}},
        ("a\\x1b[31m 5, b\\u202e 5",),
    ),
    "a list of JSON": (
        list_case(json.dumps([{"path": "im/0.png"}]), "list.jsonl"),
        None,
        ("list.jsonl: cannot be read: row 0 is no JSON object on a line of its own",),
    ),
    "JSON lines": (
        list_case(
            "".join(json.dumps({"file_name": f"im/{k}.png", "label": k % 2}) + "\n" for k in range(NUM_ROWS)),
            "list.jsonl",
        ),
        {"train": {"0": 5, "1": 5}},
        ("dataset.path_column: there is no 'path', 'file_name' is taken",),
    ),
}


def name_classes(images: list[bytes]) -> dict[str, Any]:
    return {"image": [{"bytes": image, "path": f"{k}.png"} for k, image in enumerate(images)], "label": LABELS}


TABLES: dict[str, tuple[WriteCase, dict[str, dict[str, int]] | None, tuple[str, ...]]] = {
    "structs": (table_case(name_classes), {"train": {"ant": 3, "bee": 3}}, ("read 8 rows",)),
    "structs in structs": (
        table_case(lambda images: {"sample": [{"image": {"bytes": image}} for image in images], "label": LABELS}),
        None,
        (
            "dataset.image_column: 'image' is no column of bytes",
            "columns: sample (struct<image: struct<bytes: binary>>",
        ),
    ),
    "paths only": (
        table_case(lambda images: {"image": [{"bytes": None, "path": f"{k}.png"} for k in range(8)], "label": LABELS}),
        None,
        ("dataset.image_column: 'image' is no column of bytes",),
    ),
    "null images and labels": (
        table_case(lambda images: {"image": [None, *images[1:]], "label": ["ant", None, "bee", "bee"] * 2}),
        {"train": {"ant": 1, "bee": 3}},
        ("no label: 2 images (empty 2)", "1 image cannot be decoded (1 not read)"),
    ),
    "two columns of images": (
        table_case(lambda images: {"photo": images, "mask": images, "label": LABELS}),
        {"train": {"ant": 3, "bee": 3}},
        ("dataset.image_column: there is no 'image', 'photo' is taken",),
    ),
    "Base64": (
        table_case(lambda images: {"image": [base64.b64encode(image).decode() for image in images], "label": LABELS}),
        {"train": {"ant": 3, "bee": 3}},
        ("read 8 rows",),
    ),
    "labels of another kind": (
        table_case(lambda images: {"image": images, "label": [0.5, 1.0] * 4}),
        None,
        ("it holds numbers that are not whole, e.g. 0.5",),
    ),
    "negative labels": (
        table_case(lambda images: {"image": images, "label": [-2, 0] * 4}),
        None,
        ("row 0: label -2 is out of range; valid: 0 to 999999",),
    ),
    "views": (
        table_case(lambda images: {"image": pa.array(images, pa.binary_view()), "label": LABELS}),
        {"train": {"ant": 3, "bee": 3}},
        ("read 8 rows",),
    ),
}


def make_sample(k: int, image: bytes, label: str | None = None) -> list[tuple[str, bytes]]:
    return [(f"{k}.png", image), (f"{k}.cls", (str(k % 2) if label is None else label).encode())]


ARCHIVES: dict[str, tuple[WriteCase, dict[str, dict[str, int]] | None, tuple[str, ...]]] = {
    "links, devices, hidden files": (
        archive_case(
            make_sample,
            make_special_member("9.png", tarfile.SYMTYPE, "/etc/passwd"),
            make_special_member("8.png", tarfile.CHRTYPE),
            ("._0.png", b"x"),
            ("../../7.png", encode_image(make_noise(8, 8, 7))),
            ("../../7.cls", b"1"),
            ("README", b"x"),
        ),
        {"train": {"0": 2, "1": 3}},
        ("left out 2: hidden or of the system 1, no ending 1", "2 images cannot be decoded (2 not read)"),
    ),
    "samples without a label": (
        archive_case(lambda k, image: make_sample(k, image)[: 1 + (k > 1)]),
        {"train": {"0": 2, "1": 2}},
        ("no label: 2 images (empty 2)",),
    ),
    "sample without an image": (
        archive_case(make_sample, ("99.cls", b"1")),
        {"train": {"0": 2, "1": 2}},
        ("1 image cannot be decoded (1 not read)",),
    ),
    "captions": (
        archive_case(lambda k, image: [(f"{k}.png", image), (f"{k}.txt", b"an ant")]),
        {"train": {}},
        ("left out 6: .txt 6", "no labels"),
    ),
    "another field of JSON": (
        archive_case(lambda k, image: [(f"{k}.png", image), (f"{k}.json", b'{"category": "%d"}' % (k % 2))]),
        {"train": {"0": 2, "1": 2}},
        ("there is no 'label', 'category' is taken in 6 .json files",),
    ),
    "two images a sample": (
        archive_case(lambda k, image: [(f"{k}.png", image), (f"{k}.bmp", encode_image(make_noise(8, 8, k), "BMP"))]),
        None,
        ("dataset.image_column: samples have several images: bmp 6, png 6; valid: dataset.image_column=",),
    ),
    "capitals": (
        archive_case(lambda k, image: [(name.upper(), data) for name, data in make_sample(k, image)]),
        {"train": {"0": 2, "1": 2}},
        ("read 6 images",),
    ),
}
CASES = {**FOLDERS, **LISTS, **TABLES, **ARCHIVES}


@pytest.mark.parametrize("name", CASES)
def test_sources_are_read_and_reported_or_refused(tmp_path: Path, name: str) -> None:
    write, expected, told = CASES[name]
    store, lines = read_case(tmp_path, write)
    for text in told:
        assert any(text in line for line in lines), lines
    assert (store is None) == (expected is None)
    for split, counts in (expected or {}).items():
        assert store is not None
        labels = store.labels()[store.ids(split)]
        found = {kind: int(np.sum(labels == k)) for k, kind in enumerate(store.classes)}
        assert {kind: count for kind, count in found.items() if count} == counts
    if store is not None:
        assert store.source["reading"] == lines[: len(store.source["reading"])]
    else:
        assert "\n" not in lines[0]

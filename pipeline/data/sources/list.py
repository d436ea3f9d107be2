"""A list of image files, with their labels and splits: CSV, TSV, JSON lines or Parquet.

A path is relative to `dataset.root`, or to the list's folder where there is no root, and must stay below it; an absolute path or a URI says
itself where the image is, and is read from there.
"""

import hashlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from json import loads as parse
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, json

from firstlight.pipeline.data.parquet import parquet_table
from firstlight.pipeline.data.sources.files import Files, Local, Remote, at_once, local_path, read_file, text
from firstlight.pipeline.data.sources.labels import CLASSES, Labels, class_names, numbered, whole_numbers
from firstlight.pipeline.data.sources.source import Record, Source, root_files, with_test
from firstlight.pipeline.data.store import DAMAGE
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": ""}  # with the delimiter
SPLITS = {"train": "train", "test": "test", "val": "val", "validation": "val"}
DEEP = 1000  # brackets of a row
NO_PATH, TWICE = "the row has no path", "is listed twice"


@dataclass(frozen=True)
class ImageList(Source):
    """The rows of a list, each of which leads to an image file."""

    kind = "list"
    below: Files
    paths: pa.BinaryArray  # (n,) as the list has them
    refused: dict[int, str]  # place -> reason

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        yield from at_once(self._record, places.tolist())

    def _record(self, place: int) -> Record:
        path, label = self.paths[place].as_py(), int(self.labels[place])
        known_as = text(path) or f"row {place}"
        if place in self.refused:
            return Record(known_as, None, label, self.refused[place])
        try:
            return Record(known_as, _load(self.below, path), label)
        except (OSError, ValueError) as error:  # ValueError: no path at all, e.g. with a zero byte
            return Record(known_as, None, label, (error.strerror if isinstance(error, OSError) else None) or str(error))


def open_list(dataset: "Dataset") -> ImageList:
    below, folder, name = _places(dataset)
    data = _read_list(folder, name)
    table = _columns(dataset, data, folder.where(name))
    paths = table["path"].cast(pa.binary()).fill_null(b"").combine_chunks()
    if not len(paths):
        raise UserError(f"dataset.list: no rows in {folder.where(name)}")
    classes, labels = _labels(table, below, folder.where(name))
    given = _rows(dataset, table, folder.where(name))
    rows = with_test(given, paths.to_pylist(), labels, dataset)
    left = len(paths) - sum(map(len, given.values()))
    aside = f"not read, as others are marked test: {left:,} rows that are marked val" if left else ""
    return ImageList(
        classes,
        _fingerprint(dataset, data, below, paths),
        labels,
        rows,
        below,
        paths,
        _refused(paths, below),
        aside=aside,
    )


def _places(dataset: "Dataset") -> tuple[Files, Files, str]:
    """What the paths are relative to, and the list: its folder and its name."""
    assert dataset.list is not None  # the config says so
    try:
        file = local_path(dataset.list)
    except ValueError as error:
        raise UserError(f"dataset.list: {error}") from None
    top, _, name = dataset.list.rpartition("/")
    folder, name = (Remote(top), name) if file is None else (Local(file.parent), file.name)
    if posixpath.splitext(name)[1].lower() not in FORMATS:
        raise UserError(
            f"dataset.list: {dataset.list!r} is of no known format; valid: a file that ends in {', '.join(FORMATS)}"
        )
    return (folder if dataset.root is None else root_files(dataset)), folder, name


def _read_list(folder: Files, name: str) -> bytes:
    try:
        with folder.open(name) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"dataset.list: {folder.where(name)}: cannot be read: {error.strerror}") from None


def _columns(dataset: "Dataset", data: bytes, where: str) -> pa.Table:
    """`path`, and `label` and `split` where they are asked for."""
    keys = {"path": dataset.path_column, "label": dataset.label_column, "split": dataset.split_column}
    wanted = {column: key for column, key in keys.items() if key is not None}
    try:
        table = _parse(data, posixpath.splitext(where)[1].lower(), [dataset.label_column, dataset.split_column])
    except DAMAGE as error:
        raise UserError(f"dataset.list: {where}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    for column, key in wanted.items():
        kind = table.schema.field(key).type if table.column_names.count(key) == 1 else pa.null()
        if not (
            _is_text(kind)
            or (column == "label" and pa.types.is_integer(kind))
            or (column == "path" and pa.types.is_binary(kind))
        ):
            there = ", ".join(f"{field.name} ({_called(field.type)})" for field in table.schema)
            valid = "integers or text" if column == "label" else "text"
            raise UserError(
                f"dataset.{column}_column: {key!r} is no column of {valid} in {where}; columns: {there or 'none'}"
            )
    return table.select(list(wanted.values())).rename_columns(list(wanted))


def _called(kind: pa.DataType) -> str:
    return "text" if _is_text(kind) or pa.types.is_binary(kind) else str(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parse(data: bytes, suffix: str, texts: list[str | None]) -> pa.Table:
    """`texts`: columns of CSV that must be UTF-8; paths need not be."""
    data = data.removeprefix(b"\xef\xbb\xbf")  # written by spreadsheets
    source = pa.BufferReader(data)
    if suffix == ".parquet":
        return parquet_table(source)
    if not FORMATS[suffix]:
        _check_rows(data)
        return json.read_json(source)
    one = csv.ReadOptions(use_threads=False)  # only then is a wrong row named
    layout = csv.ParseOptions(delimiter=FORMATS[suffix], newlines_in_values=True)
    names = csv.open_csv(pa.BufferReader(data), read_options=one, parse_options=layout).schema.names
    kinds = csv.ConvertOptions(
        column_types={name: pa.string() if name in texts else pa.binary() for name in names},
        null_values=[""],
        strings_can_be_null=True,
    )
    return csv.read_csv(source, read_options=one, parse_options=layout, convert_options=kinds)


def _check_rows(data: bytes) -> None:
    """Raises ValueError or RecursionError. pyarrow's parser ends the process over what is nested some ten thousand deep, on a line or over many."""
    for number, line in enumerate(data.splitlines()):
        row = line.strip()
        if row and not (row.startswith(b"{") and row.endswith(b"}")):
            raise ValueError(f"row {number} is no JSON object on a line of its own")
        if row.count(b"[") + row.count(b"{") > DEEP:
            parse(row)


def _labels(table: pa.Table, below: Files, where: str) -> Labels:
    if "label" not in table.column_names:
        return (), np.full(len(table), -1, np.int64)
    values = table["label"]
    values = values.cast(pa.int64()) if pa.types.is_integer(values.type) else whole_numbers(values.cast(pa.string()))
    listed = below.where(CLASSES) if below.exists(CLASSES) else ""
    return numbered(values, class_names(below), lambda place: f"{where}: row {place}", listed)


def _rows(dataset: "Dataset", table: pa.Table, where: str) -> dict[str, np.ndarray]:
    """Split -> rows. Where rows are marked test, those marked val are not read."""
    if "split" not in table.column_names:
        return {"train": np.arange(len(table))}
    encoded = table["split"].cast(pa.string()).combine_chunks().dictionary_encode()
    kinds = np.array([*(SPLITS.get(value, "") for value in encoded.dictionary.to_pylist()), ""])
    found = kinds[encoded.indices.fill_null(len(kinds) - 1).to_numpy(zero_copy_only=False)]
    if (wrong := np.flatnonzero(found == "")).size:
        value = table["split"][int(wrong[0])].as_py()
        raise UserError(
            f"{where}: row {wrong[0]}: {dataset.split_column} {value!r} is no split; valid: {', '.join(SPLITS)}"
        )
    rows = {
        "train": np.flatnonzero(found == "train"),
        "test": np.flatnonzero(found == ("test" if (found == "test").any() else "val")),
    }
    if not len(rows["train"]):
        raise UserError(f"dataset.split_column: no row of {where} is marked train in {dataset.split_column!r}")
    return {split: places for split, places in rows.items() if len(places)}


def _refused(paths: pa.BinaryArray, below: Files) -> dict[int, str]:
    """Rows without a path, and all but the first of those with the same: an image in two splits would be tested on what it was trained on."""
    indices = _plain(paths, below).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    firsts = np.unique(indices, return_index=True)[1]
    twice = dict.fromkeys(np.setdiff1d(np.arange(len(paths)), firsts, assume_unique=True).tolist(), TWICE)
    return {
        **twice,
        **dict.fromkeys(
            np.flatnonzero(pc.equal(pc.binary_length(paths), 0).to_numpy(zero_copy_only=False)).tolist(), NO_PATH
        ),
    }


def _plain(paths: pa.BinaryArray, below: Files) -> pa.BinaryArray:
    """As few ways to write a path as there are without asking the disk: ./a.png, b/../a.png and <root>/a.png are a.png."""
    root = posixpath.join(os.fsencode(below.where()), b"")
    odd = np.flatnonzero(pc.match_substring_regex(paths, rb"^/|//|\./").to_numpy(zero_copy_only=False))
    found = {k: path for k in odd.tolist() if b"://" not in (path := paths[k].as_py())}
    if not found:
        return paths
    plain = paths.to_pylist()
    for k, path in found.items():
        plain[k] = posixpath.normpath(path).removeprefix(root)
    return pa.array(plain, pa.binary())


def _fingerprint(dataset: "Dataset", data: bytes, below: Files, paths: pa.BinaryArray) -> str:
    """Of the list, and of the images: on disk each is asked for, of a bucket what its listing says; of web servers and URIs only the list counts."""
    found = hashlib.sha256(
        f"{dataset.path_column}\0{dataset.split_column}\0{below.where()}\0".encode("utf-8", "surrogateescape") + data
    )
    if isinstance(below, Remote):
        for fact in sorted(below.find()) if not below.root.startswith("http") else ():
            found.update(b"%s\0%d\0%d\0" % fact)
    else:
        for path in paths:
            found.update(b"%d\0%d\0" % _stat(os.path.join(os.fsencode(below.where()), path.as_py())))
    return found.hexdigest()


def _stat(file: bytes) -> tuple[int, int]:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _load(below: Files, path: bytes) -> bytes:
    if b"://" in path:
        file = local_path(os.fsdecode(path))
        top, _, name = path.rpartition(b"/")
        return Remote(os.fsdecode(top)).read(name) if file is None else read_file(os.fsencode(file))
    if path.startswith(b"/") and isinstance(below, Local):
        return read_file(path)
    inside = posixpath.normpath(path)
    if inside.startswith((b"../", b"/")) or inside == b"..":
        raise OSError("path leaves the root")
    return below.read(inside)

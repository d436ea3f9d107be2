"""A list of image files, with their labels and splits: CSV, TSV, JSON lines or Parquet.

A path is relative to `dataset.root`, or to the folder of the list if there is no root, and must stay below it. An
absolute path or a URI is read as it is.
"""

import hashlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from firstlight.pipeline.data.sources.files import (
    Files,
    LocalFiles,
    decode_path,
    parse_local_path,
    read_concurrently,
    read_image_file,
)
from firstlight.pipeline.data.sources.labels import (
    CLASSES_FILE,
    ClassLabels,
    number_labels,
    parse_integers,
    read_class_names,
)
from firstlight.pipeline.data.sources.list_columns import LIST_DELIMITERS, parse_list_columns
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.data.sources.source import Record, Source, SourceOptions, add_test_split, open_root
from firstlight.pipeline.errors import UserError

# Value in the column of splits -> split; val becomes the test split if no row is marked test
SPLIT_OF_VALUE = {"train": "train", "test": "test", "val": "val", "validation": "val"}
NO_PATH_REASON, DUPLICATE_REASON = "the row has no path", "is listed twice"


@dataclass(frozen=True)
class ImageList(Source):
    """The rows of a list, each of which names an image file."""

    kind = "list"
    files: Files
    # (n,) as the list has them
    paths: pa.BinaryArray
    # Row -> the reason why it is not read
    refused: dict[int, str]

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        yield from read_concurrently(self._read_record, indices.tolist())

    def _read_record(self, index: int) -> Record:
        path, label = self.paths[index].as_py(), int(self.labels[index])
        known_as = decode_path(path) or f"row {index}"
        if index in self.refused:
            return Record(known_as, None, label, self.refused[index])
        try:
            return Record(known_as, _load_image(self.files, path), label)
        # ValueError: the text is no path, for example as it holds a zero byte
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            return Record(known_as, None, label, reason)


def open_list(dataset: SourceOptions) -> ImageList:
    """Reads the list.

    Raises:
        UserError: the list cannot be read or has no rows, lacks a column, or holds a label or a split that is not
            valid.
    """
    below, folder, name = _locate_list(dataset)
    where = folder.get_location(name)
    data = _read_list(folder, name)
    table = parse_list_columns(dataset, data, where)
    paths = table["path"].cast(pa.binary()).fill_null(b"").combine_chunks()
    if not len(paths):
        raise UserError(f"dataset.list: no rows in {where}")
    classes, labels = _number_list_labels(table, below, where)
    marked = _split_rows(dataset, table, where)
    rows = add_test_split(marked, paths.to_pylist(), labels, dataset)
    unread = len(paths) - sum(map(len, marked.values()))
    note = f"not read, as others are marked test: {unread:,} rows that are marked val" if unread else ""
    fingerprint, refused = _hash_list(dataset, data, below, paths), _refuse_rows(paths, below)
    return ImageList(classes, fingerprint, labels, rows, below, paths, refused, unread_note=note)


def _locate_list(dataset: SourceOptions) -> tuple[Files, Files, str]:
    """Returns the files that the paths are relative to, the folder of the list, and the name of the list.

    Raises:
        UserError: the format of the list or the scheme of its URI is not known, or as `open_root`.
    """
    # The config makes sure of it
    assert dataset.list is not None
    try:
        file = parse_local_path(dataset.list)
    except ValueError as error:
        raise UserError(f"dataset.list: {error}") from None
    top, _, name = dataset.list.rpartition("/")
    folder, name = (RemoteFiles(top), name) if file is None else (LocalFiles(file.parent), file.name)
    if posixpath.splitext(name)[1].lower() not in LIST_DELIMITERS:
        raise UserError(
            f"dataset.list: {dataset.list!r} is of no known format; "
            f"valid: a file that ends in {', '.join(LIST_DELIMITERS)}"
        )
    return (folder if dataset.root is None else open_root(dataset.root, dataset.source)), folder, name


def _read_list(folder: Files, name: str) -> bytes:
    try:
        with folder.open(name) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"dataset.list: {folder.get_location(name)}: cannot be read: {error.strerror}") from None


def _number_list_labels(table: pa.Table, below: Files, where: str) -> ClassLabels:
    if "label" not in table.column_names:
        return (), np.full(len(table), -1, np.int64)
    values = table["label"]
    values = values.cast(pa.int64()) if pa.types.is_integer(values.type) else parse_integers(values.cast(pa.string()))
    listed = below.get_location(CLASSES_FILE) if below.exists(CLASSES_FILE) else ""
    return number_labels(values, read_class_names(below), lambda index: f"{where}: row {index}", listed)


def _split_rows(dataset: SourceOptions, table: pa.Table, where: str) -> dict[str, np.ndarray]:
    """Returns the rows of each split. If rows are marked test, those marked val are not read.

    Raises:
        UserError: a row has no valid split, or no row is marked train.
    """
    if "split" not in table.column_names:
        return {"train": np.arange(len(table))}
    encoded = table["split"].cast(pa.string()).combine_chunks().dictionary_encode()
    kinds = np.array([*(SPLIT_OF_VALUE.get(value, "") for value in encoded.dictionary.to_pylist()), ""])
    found = kinds[encoded.indices.fill_null(len(kinds) - 1).to_numpy(zero_copy_only=False)]
    if (wrong := np.flatnonzero(found == "")).size:
        value = table["split"][int(wrong[0])].as_py()
        raise UserError(
            f"{where}: row {wrong[0]}: {dataset.split_column} {value!r} is no split; valid: {', '.join(SPLIT_OF_VALUE)}"
        )
    rows = {
        "train": np.flatnonzero(found == "train"),
        "test": np.flatnonzero(found == ("test" if (found == "test").any() else "val")),
    }
    if not len(rows["train"]):
        raise UserError(f"dataset.split_column: no row of {where} is marked train in {dataset.split_column!r}")
    return {split: indices for split, indices in rows.items() if len(indices)}


def _refuse_rows(paths: pa.BinaryArray, below: Files) -> dict[int, str]:
    """Returns the rows that are not read, with the reason: rows without a path, and repetitions of a path.

    An image in two splits would be tested on after it was trained on.
    """
    codes = _normalise_paths(paths, below).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    firsts = np.unique(codes, return_index=True)[1]
    twice = dict.fromkeys(np.setdiff1d(np.arange(len(paths)), firsts, assume_unique=True).tolist(), DUPLICATE_REASON)
    empty = np.flatnonzero(pc.equal(pc.binary_length(paths), 0).to_numpy(zero_copy_only=False))
    return {**twice, **dict.fromkeys(empty.tolist(), NO_PATH_REASON)}


def _normalise_paths(paths: pa.BinaryArray, below: Files) -> pa.BinaryArray:
    """Returns the paths, written alike as far as that is possible without asking the disk.

    ./a.png, b/../a.png and <root>/a.png become a.png.
    """
    root = posixpath.join(os.fsencode(below.get_location()), b"")
    odd = np.flatnonzero(pc.match_substring_regex(paths, rb"^/|//|\./").to_numpy(zero_copy_only=False))
    found = {k: path for k in odd.tolist() if b"://" not in (path := paths[k].as_py())}
    if not found:
        return paths
    plain = paths.to_pylist()
    for k, path in found.items():
        plain[k] = posixpath.normpath(path).removeprefix(root)
    return pa.array(plain, pa.binary())


def _hash_list(dataset: SourceOptions, data: bytes, below: Files, paths: pa.BinaryArray) -> str:
    """Returns the fingerprint of the list and of the images.

    On disk, each image is asked for its size and time; for a bucket, its listing counts. For web servers, and images at
    URIs of their own, only the list counts.
    """
    found = hashlib.sha256(
        f"{dataset.path_column}\0{dataset.split_column}\0{below.get_location()}\0".encode("utf-8", "surrogateescape")
        + data
    )
    if isinstance(below, RemoteFiles):
        for fact in sorted(below.list_all()) if not below.root.startswith("http") else ():
            found.update(b"%s\0%d\0%d\0" % fact)
    else:
        for path in paths:
            found.update(b"%d\0%d\0" % _stat_file(os.path.join(os.fsencode(below.get_location()), path.as_py())))
    return found.hexdigest()


def _stat_file(file: bytes) -> tuple[int, int]:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _load_image(below: Files, path: bytes) -> bytes:
    if b"://" in path:
        file = parse_local_path(os.fsdecode(path))
        top, _, name = path.rpartition(b"/")
        return RemoteFiles(os.fsdecode(top)).read(name) if file is None else read_image_file(os.fsencode(file))
    if path.startswith(b"/") and isinstance(below, LocalFiles):
        return read_image_file(path)
    inside = posixpath.normpath(path)
    if inside.startswith((b"../", b"/")) or inside == b"..":
        raise OSError("path leaves the root")
    return below.read(inside)

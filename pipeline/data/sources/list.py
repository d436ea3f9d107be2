"""A list of image files, with their labels and splits: CSV, TSV, JSON lines or Parquet.

A path is relative to `dataset.root`, or to the folder of the list if there is no root, and must stay below it. An
absolute path or a URI is read as it is.
"""

import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.sources.conventions.reading import (
    describe_absent_classes,
    describe_classes,
    describe_read_files,
    drop_refused,
)
from firstlight.pipeline.data.sources.files import (
    Files,
    LocalFiles,
    decode_path,
    parse_local_path,
    read_image_file,
    read_many,
)
from firstlight.pipeline.data.sources.labels import (
    CLASSES_FILE,
    LabelReading,
    read_class_names,
    read_labels,
    simplify_labels,
)
from firstlight.pipeline.data.sources.list_columns import LIST_DELIMITERS, parse_list_columns
from firstlight.pipeline.data.sources.list_rows import (
    find_repeated_images,
    merge_labels,
    resolve_paths,
    split_rows,
    spread_label_lists,
)
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.data.sources.source import Record, Source, SourceFiles, SourceOptions, open_root
from firstlight.pipeline.data.sources.source_splits import settle_splits
from firstlight.pipeline.errors import UserError, describe_os_error

NO_PATH_REASON, REPEATED_REASON = "the row has no path", "of an image that stands in an earlier row"


@dataclass(frozen=True)
class ImageList(Source):
    """The rows of a list, each of which names an image file."""

    kind = "list"
    files: Files
    # (n,) as they are read
    paths: pa.BinaryArray
    # Row -> the reason why it is not read
    refused: dict[int, str]
    # (n, C) int8 of `Annotation.present`, where an image has several labels
    present: np.ndarray | None = field(default=None, kw_only=True)
    # SHA-256 of the list and of the keys by which it is read
    list_hash: str = field(default="", kw_only=True)

    def list_files(self) -> SourceFiles:
        # Absolute paths leave the root
        files = LocalFiles(self.files.root, follow_links=True) if isinstance(self.files, LocalFiles) else self.files
        return SourceFiles(files, [path for path in self.paths.to_pylist() if b"://" not in path], self.list_hash)

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        yield from read_many(self._read_record, indices.tolist())

    def _read_record(self, index: int) -> Record:
        path, label = self.paths[index].as_py(), int(self.labels[index])
        known_as = decode_path(path) or f"row {index}"
        if index in self.refused:
            return Record(known_as, None, label, self.refused[index])
        annotation = None if self.present is None else Annotation(present=self.present[index])
        try:
            return Record(known_as, _load_image(self.files, path), label, None, annotation)
        # ValueError: the text is no path, for example as it holds a zero byte
        except (OSError, ValueError) as error:
            return Record(known_as, None, label, describe_os_error(error, None))


def open_list(dataset: SourceOptions) -> ImageList:
    """Reads the list.

    Raises:
        UserError: the list cannot be read or has no rows, lacks a column, holds a label or a split that is not valid,
            none of its images exists, or an image has two labels.
    """
    below, folder, name = _locate_list(dataset)
    where = folder.get_location(name)
    data = _read_list(folder, name)
    found = parse_list_columns(dataset, data, where)
    if not len(found.table):
        raise UserError(f"dataset.list: no rows in {where}")
    has_several = "present" in (dataset.annotations or ())
    table = spread_label_lists(found.table) if has_several else found.table
    read = _number_list_labels(dataset, table, below, where)
    marked = split_rows(dataset, table, where)
    paths, path_notes = resolve_paths(table["path"], below, found.encoding, where)
    repeated = find_repeated_images(paths, below)
    labels = merge_labels(read, repeated, paths, where, has_several)
    # An image in two splits would be tested on after it was trained on
    rows = {split: np.intersect1d(indices, repeated.kept) for split, indices in marked.rows.items()}
    settled = settle_splits({k: v for k, v in rows.items() if len(v)}, paths.to_pylist(), labels.single, dataset)
    refused = _refuse_rows(paths)
    read_rows = drop_refused(settled.rows, refused)
    repeats = {} if has_several else {REPEATED_REASON: _count_rows(marked.rows) - _count_rows(rows)}
    reading = (
        *found.reading,
        describe_read_files(_count_rows(read_rows), {**marked.left_out, **repeats, **_count_reasons(refused)}, "rows"),
        *marked.reading,
        *settled.reading,
        *describe_classes(read.classes, labels.counted, read_rows),
    )
    notes = (
        *found.notes,
        *path_notes,
        *read.notes,
        *marked.notes,
        *settled.notes,
        *repeated.describe_splits(marked.rows, paths),
        *describe_absent_classes(read.classes, labels.counted, read_rows),
    )
    return ImageList(
        read.classes,
        _hash_list(dataset, data, below, table["path"]),
        labels.single,
        settled.rows,
        below,
        paths,
        refused,
        present=labels.present,
        list_hash=_hash_options(dataset, data),
        annotations=("present",) if has_several else (),
        reading=reading,
        notes=notes,
        draws_test=settled.draws_test,
    )


def _count_rows(rows: Mapping[str, np.ndarray]) -> int:
    return sum(map(len, rows.values()))


def _count_reasons(refused: dict[int, str]) -> dict[str, int]:
    reasons = list(refused.values())
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


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


def _number_list_labels(dataset: SourceOptions, table: pa.Table, below: Files, where: str) -> LabelReading:
    if "label" not in table.column_names:
        return LabelReading((), np.full(len(table), -1, np.int64))
    try:
        values = simplify_labels(table["label"])
    except ValueError as error:
        several = "; valid: one label a row, or dataset.annotations=[present]" if "several" in str(error) else ""
        raise UserError(f"dataset.label_column: {dataset.label_column!r} in {where} {error}{several}") from None
    listed = below.get_location(CLASSES_FILE) if below.exists(CLASSES_FILE) else ""
    return read_labels(values, read_class_names(below), lambda index: f"{where}: row {index}", dataset, listed)


def _refuse_rows(paths: pa.BinaryArray) -> dict[int, str]:
    """Returns the rows that cannot be read, with the reason: those without a path."""
    empty = np.flatnonzero(pc.equal(pc.binary_length(paths), 0).to_numpy(zero_copy_only=False))
    return dict.fromkeys(empty.tolist(), NO_PATH_REASON)


def _hash_options(dataset: SourceOptions, data: bytes) -> str:
    options = (dataset.path_column, dataset.label_column, dataset.split_column, dataset.encoding, dataset.delimiter)
    return hashlib.sha256(repr(options).encode("utf-8", "surrogateescape") + data).hexdigest()


def _hash_list(dataset: SourceOptions, data: bytes, below: Files, paths: pa.ChunkedArray) -> str:
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
        for path in paths.cast(pa.binary()).fill_null(b"").to_pylist():
            found.update(b"%d\0%d\0" % _stat_file(os.path.join(os.fsencode(below.get_location()), path)))
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

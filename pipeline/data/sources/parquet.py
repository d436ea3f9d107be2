"""Parquet files of images, for example of a Hugging Face data set: train-*.parquet, test-*.parquet."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS
from firstlight.pipeline.data.parquet import open_parquet_file
from firstlight.pipeline.data.sources.files import MAX_IMAGE_BYTES, Files, describe_too_large, hash_facts
from firstlight.pipeline.data.sources.labels import CLASSES_FILE, number_labels, read_class_names
from firstlight.pipeline.data.sources.source import (
    Record,
    Source,
    SourceOptions,
    add_test_split,
    describe_unread,
    open_root,
    split_by_prefix,
)
from firstlight.pipeline.errors import UserError, one_line

# The most of a row group that is in memory at a time; bytes are estimated by the mean of its rows
MAX_READ_ROWS, MAX_READ_BYTES = 128, 1 << 26
# The image of a row, " path" if the row states one, and the reason if there is no image
ParquetImage = tuple[bytes | None, str, str | None]


@dataclass(frozen=True)
class ParquetSource(Source):
    """Rows of Parquet files, laid end to end."""

    kind = "parquet"
    root: Files
    # (name, number of rows) of each file
    files: tuple[tuple[str, int], ...]
    # The column of the encoded images: (column,) or (column, field)
    column: tuple[str, ...]

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        start = 0
        for k, rows in _group_by_part([rows for _, rows in self.files], indices):
            name, labels = self.files[k][0], self.labels[indices[start : start + len(rows)]].tolist()
            for row, label, (data, known_as, reason) in zip(
                rows.tolist(), labels, self._read_images(name, rows), strict=True
            ):
                yield Record(f"{name}#{row}{known_as}", data, label, reason)
            start += len(rows)

    def _read_images(self, name: str, rows: np.ndarray) -> Iterator[ParquetImage]:
        """Yields the images of ascending rows of one file. Damage costs the rows of its row group from there on."""
        try:
            source = self.root.open_arrow(name)
            file = open_parquet_file(source, pre_buffer=False, buffer_size=2**20)
        except DAMAGE_ERRORS as error:
            yield from [_make_damaged(name, error)] * len(rows)
            return
        with source, file:
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
            for group, within in _group_by_part(sizes, rows):
                yield from _replace_damaged(name, len(within), self._read_row_group(file, group, within))

    def _read_row_group(self, file: pq.ParquetFile, group: int, rows: np.ndarray) -> Iterator[ParquetImage]:
        """Yields the images of ascending rows of one row group, of which a small part is in memory at a time."""
        facts = file.metadata.row_group(group)
        count = min(MAX_READ_ROWS, max(1, MAX_READ_BYTES * facts.num_rows // max(facts.total_byte_size, 1)))
        start = 0
        for batch in file.iter_batches(count, row_groups=[group], columns=[self.column[0]], use_threads=False):
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            for value in batch.column(0).take(pa.array(wanted)).to_pylist():
                data, path = value, None
                if isinstance(value, dict):
                    data, path = value.get(self.column[-1]), value.get("path")
                reason = None
                if data is None:
                    reason = "the row has no image (null)"
                elif len(data) > MAX_IMAGE_BYTES:
                    reason = describe_too_large(len(data))
                yield data if reason is None else None, f" {path}" if isinstance(path, str) else "", reason
            start += len(batch)


def _group_by_part(sizes: Sequence[int], indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (part, indices within it) for each part that holds some of the ascending `indices`.

    `sizes` has the number of entries of each part; the parts are laid end to end.
    """
    ends = np.cumsum(sizes)
    parts = np.searchsorted(ends, indices, side="right")
    for part in np.unique(parts).tolist():
        yield part, indices[parts == part] - (ends[part] - sizes[part])


def _replace_damaged(name: str, count: int, values: Iterator[ParquetImage]) -> Iterator[ParquetImage]:
    """Yields `count` values: if reading fails, the remaining ones are the reason instead."""
    done = 0
    try:
        for value in values:
            yield value
            done += 1
    except DAMAGE_ERRORS as error:
        yield from [_make_damaged(name, error)] * (count - done)


def _make_damaged(name: str, error: BaseException) -> ParquetImage:
    return None, "", f"{name} cannot be read: {one_line(error, limit=1000)}"


def open_parquet(dataset: SourceOptions) -> ParquetSource:
    """Lists the rows of the Parquet files below `dataset.root`.

    Raises:
        UserError: there are no rows for training, a file cannot be read, a column is missing or has other types in
            other files, or a label is no class.
    """
    below = open_root(dataset.root, dataset.source)
    splits = _list_parquet_files(below)
    names = [name for split in splits.values() for name in split]
    schemas, counts = zip(*(_read_schema(below, name) for name in names), strict=True)
    files = tuple(zip(names, counts, strict=True))
    column = _find_common_column(dataset.image_column, names, schemas, below)
    classes, labels = _number_parquet_labels(dataset, below, files, schemas)
    first = sum(rows for name, rows in files if name in splits["train"])
    if first == 0:
        raise UserError(f"dataset.root: no rows in {', '.join(splits['train'])} of {below.get_location()!r}")
    rows = {"train": np.arange(first), "test": np.arange(first, len(labels))}
    keys = [f"{name}#{row}".encode() for name, count in files for row in range(count)]
    rows = add_test_split({split: indices for split, indices in rows.items() if len(indices)}, keys, labels, dataset)
    facts = [below.get_facts(name) for name in names + [CLASSES_FILE] * below.exists(CLASSES_FILE)]
    others = {name for name in below.list_names() if name.endswith(".parquet")} - {*names}
    note = describe_unread(others, "as others are named for the splits")
    return ParquetSource(classes, hash_facts(sorted(facts)), labels, rows, below, files, column, unread_note=note)


def _find_common_column(
    column: str, names: Sequence[str], schemas: Sequence[pa.Schema], below: Files
) -> tuple[str, ...]:
    found = {
        _find_image_column(column, schema, below.get_location(name))
        for name, schema in zip(names, schemas, strict=True)
    }
    if len(found) > 1:
        where = below.get_location()
        raise UserError(f"dataset.image_column: {column!r} is not of one type in all files of {where!r}")
    return found.pop()


def _list_parquet_files(below: Files) -> dict[str, list[str]]:
    names = [name for name in below.list_names() if name.endswith(".parquet")]
    if not names:
        raise UserError(f"dataset.root: no *.parquet files in {below.get_location()!r}")
    return split_by_prefix(names)


def _read_schema(below: Files, name: str) -> tuple[pa.Schema, int]:
    try:
        with below.open_arrow(name) as source, open_parquet_file(source) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except DAMAGE_ERRORS as error:
        raise UserError(
            f"{below.get_location(name)}: cannot be read as Parquet: {one_line(error, limit=1000)}"
        ) from None


def _find_image_column(column: str, schema: pa.Schema, file: str) -> tuple[str, ...]:
    """Returns the column of the encoded images: a column of bytes, or a field of a column of structs.

    The field is the one after the dot of `column`, or `bytes`.

    Raises:
        UserError: there is no such column in `file`.
    """
    top, _, field = (column, "", "") if column in schema.names else column.partition(".")
    kind = schema.field(top).type if top in schema.names else None
    if kind is not None and pa.types.is_struct(kind):
        field = field or "bytes"
        kind = kind.field(field).type if kind.get_field_index(field) >= 0 else None
    elif field:
        kind = None
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"dataset.image_column: {column!r} is no column of bytes, or of structs with a field 'bytes', in {file}; "
            f"columns: {_describe_columns(schema)}"
        )
    return (top, field) if field else (top,)


def _describe_columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _number_parquet_labels(
    dataset: SourceOptions, below: Files, files: Sequence[tuple[str, int]], schemas: Sequence[pa.Schema]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the names of the classes, and (n,) int64 labels with -1 for null.

    Raises:
        UserError: the column is missing, has other types in other files, or holds a label that is no class.
    """
    column = dataset.label_column
    if column is None:
        return (), np.full(sum(rows for _, rows in files), -1, np.int64)
    # Labels are text -> a file in which they are
    kinds: dict[bool, str] = {}
    for (name, _), schema in zip(files, schemas, strict=True):
        kinds.setdefault(_is_text_column(column, schema, below.get_location(name)), below.get_location(name))
    if len(kinds) > 1:
        raise UserError(
            f"dataset.label_column: {column!r} has mixed types: text in {kinds[True]}, integers in {kinds[False]}"
        )
    kind = pa.string() if True in kinds else pa.int64()
    values = pa.chunked_array(
        [chunk for name, _ in files for chunk in _read_label_column(below, name, column, kind).chunks], kind
    )
    known = read_class_names(below) or _read_hugging_face_classes(schemas[0], column)
    return number_labels(
        values,
        known,
        lambda index: _describe_row(files, index, below),
        below.get_location(CLASSES_FILE) if below.exists(CLASSES_FILE) else "",
    )


def _describe_row(files: Sequence[tuple[str, int]], index: int, below: Files) -> str:
    ends = np.cumsum([rows for _, rows in files])
    name, rows = files[(k := int(np.searchsorted(ends, index, side="right")))]
    return f"{below.get_location(name)}: row {index - ends[k] + rows}"


def _is_text_column(column: str, schema: pa.Schema, file: str) -> bool:
    kind = schema.field(column).type if column in schema.names else None
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    text = kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))
    if kind is None or not (text or pa.types.is_integer(kind)):
        raise UserError(
            f"dataset.label_column: {column!r} is no column of integers or text in {file}; "
            f"columns: {_describe_columns(schema)}; null: no labels"
        )
    return text


def _read_label_column(below: Files, name: str, column: str, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        with below.open_arrow(name) as source, open_parquet_file(source) as opened:
            return opened.read(columns=[column], use_threads=False).column(column).cast(kind)
    except DAMAGE_ERRORS as error:
        where = below.get_location(name)
        raise UserError(f"{where}: the column {column!r} cannot be read: {one_line(error, limit=1000)}") from None


def _read_hugging_face_classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"]))
    # The file was not written by `datasets`, or the column is no class label
    except (KeyError, TypeError, ValueError):
        return ()

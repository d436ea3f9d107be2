"""Parquet files of images, e.g. of a Hugging Face data set: train-*.parquet, test-*.parquet."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.parquet import parquet_file
from firstlight.pipeline.data.sources.files import MAX_BYTES, Files, fingerprint, too_large
from firstlight.pipeline.data.sources.labels import CLASSES, class_names, numbered
from firstlight.pipeline.data.sources.source import Record, Source, by_start, not_read, root_files, with_test
from firstlight.pipeline.data.store import DAMAGE
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

READ_ROWS, READ_BYTES = 128, 1 << 26  # of a row group in memory at a time, at most; the bytes by the mean of its rows
Value = tuple[
    bytes | None, str, str | None
]  # a Parquet row's image, " path" if it states one, and the reason where there is no image


@dataclass(frozen=True)
class Parquet(Source):
    """Rows of Parquet files, e.g. of a Hugging Face data set."""

    kind = "parquet"
    below: Files
    files: tuple[tuple[str, int], ...]  # name, rows
    column: tuple[str, ...]  # of the image's bytes: (column,) or (column, field)

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        first = 0
        for k, rows in _by_part([rows for _, rows in self.files], places):
            name, labels = self.files[k][0], self.labels[places[first : first + len(rows)]].tolist()
            for row, label, (data, known_as, reason) in zip(
                rows.tolist(), labels, self._images(name, rows), strict=True
            ):
                yield Record(f"{name}#{row}{known_as}", data, label, reason)
            first += len(rows)

    def _images(self, name: str, rows: np.ndarray) -> Iterator[Value]:
        """Of ascending rows of one file. Damage costs the rows of its row group from there on."""
        try:
            source = self.below.open_arrow(name)
            file = parquet_file(source, pre_buffer=False, buffer_size=2**20)
        except DAMAGE as error:
            yield from [_unread(name, error)] * len(rows)
            return
        with source, file:
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
            for group, within in _by_part(sizes, rows):
                yield from _or_reason(name, len(within), self._values(file, group, within))

    def _values(self, file: pq.ParquetFile, group: int, rows: np.ndarray) -> Iterator[Value]:
        """Of ascending rows of one row group, of which only a few are in memory at a time."""
        facts = file.metadata.row_group(group)
        count = min(READ_ROWS, max(1, READ_BYTES * facts.num_rows // max(facts.total_byte_size, 1)))
        start = 0
        for batch in file.iter_batches(count, row_groups=[group], columns=[self.column[0]], use_threads=False):
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            for value in batch.column(0).take(pa.array(wanted)).to_pylist():
                data, path = (
                    (value.get(self.column[-1]), value.get("path")) if isinstance(value, dict) else (value, None)
                )
                reason = (
                    "the row has no image (null)"
                    if data is None
                    else too_large(len(data))
                    if len(data) > MAX_BYTES
                    else None
                )
                yield data if reason is None else None, f" {path}" if isinstance(path, str) else "", reason
            start += len(batch)


def _by_part(sizes: Sequence[int], places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Ascending places in parts laid end to end -> (part, places within it) of each part that holds some."""
    ends = np.cumsum(sizes)
    parts = np.searchsorted(ends, places, side="right")
    for part in np.unique(parts).tolist():
        yield part, places[parts == part] - (ends[part] - sizes[part])


def _or_reason(name: str, count: int, values: Iterator[Value]) -> Iterator[Value]:
    """`count` values: where reading fails, the reason takes the place of the rest."""
    done = 0
    try:
        for value in values:
            yield value
            done += 1
    except DAMAGE as error:
        yield from [_unread(name, error)] * (count - done)


def _unread(name: str, error: BaseException) -> Value:
    return None, "", f"{name} cannot be read: {' '.join(str(error).split())}"


def open_parquet(dataset: "Dataset") -> Parquet:
    below = root_files(dataset)
    names = _parquet_names(below)
    schemas, counts = zip(*(_parquet_facts(below, name) for split in names.values() for name in split), strict=True)
    files = tuple(zip([name for split in names.values() for name in split], counts, strict=True))
    columns = {
        _image_column(dataset.image_column, schema, below.where(name))
        for (name, _), schema in zip(files, schemas, strict=True)
    }
    if len(columns) > 1:
        raise UserError(
            f"dataset.image_column: {dataset.image_column!r} is not of one type in all files of {below.where()!r}"
        )
    classes, labels = _parquet_labels(dataset, below, files, schemas)
    first = sum(rows for name, rows in files if name in names["train"])
    if first == 0:
        raise UserError(f"dataset.root: no rows in {', '.join(names['train'])} of {below.where()!r}")
    rows = {"train": np.arange(first), "test": np.arange(first, len(labels))}
    keys = [f"{name}#{row}".encode() for name, count in files for row in range(count)]
    rows = with_test({split: places for split, places in rows.items() if len(places)}, keys, labels, dataset)
    facts = [below.facts(name) for name in [name for name, _ in files] + [CLASSES] * below.exists(CLASSES)]
    others = {name for name in below.names() if name.endswith(".parquet")} - {name for name, _ in files}
    aside = not_read(others, "as others are named for the splits")
    return Parquet(classes, fingerprint(sorted(facts)), labels, rows, below, files, columns.pop(), aside=aside)


def _parquet_names(below: Files) -> dict[str, list[str]]:
    names = [name for name in below.names() if name.endswith(".parquet")]
    if not names:
        raise UserError(f"dataset.root: no *.parquet files in {below.where()!r}")
    return by_start(names)


def _parquet_facts(below: Files, name: str) -> tuple[pa.Schema, int]:
    try:
        with below.open_arrow(name) as source, parquet_file(source) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except DAMAGE as error:
        raise UserError(f"{below.where(name)}: cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _image_column(column: str, schema: pa.Schema, file: str) -> tuple[str, ...]:
    """Where the bytes are: a column of bytes, or a field (`bytes`, or the one after the dot) of a column of structs."""
    top, _, field = (column, "", "") if column in schema.names else column.partition(".")
    kind = schema.field(top).type if top in schema.names else None
    if kind is not None and pa.types.is_struct(kind):
        field = field or "bytes"
        kind = kind.field(field).type if kind.get_field_index(field) >= 0 else None
    elif field:
        kind = None
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"dataset.image_column: {column!r} is no column of bytes, or of structs with a field 'bytes', in {file}; columns: {_columns(schema)}"
        )
    return (top, field) if field else (top,)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _parquet_labels(
    dataset: "Dataset", below: Files, files: Sequence[tuple[str, int]], schemas: Sequence[pa.Schema]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes by name, and labels (n,) int64 with -1 for null."""
    column = dataset.label_column
    if column is None:
        return (), np.full(sum(rows for _, rows in files), -1, np.int64)
    kinds: dict[bool, str] = {}  # label is a text -> a file where it is so
    for (name, _), schema in zip(files, schemas, strict=True):
        kinds.setdefault(_is_text(column, schema, below.where(name)), below.where(name))
    if len(kinds) > 1:
        raise UserError(
            f"dataset.label_column: {column!r} has mixed types: text in {kinds[True]}, integers in {kinds[False]}"
        )
    kind = pa.string() if True in kinds else pa.int64()
    values = pa.chunked_array(
        [chunk for name, _ in files for chunk in _read_labels(below, name, column, kind).chunks], kind
    )
    known = class_names(below) or _hugging_face_names(schemas[0], column)
    return numbered(
        values, known, lambda place: _row(files, place, below), below.where(CLASSES) if below.exists(CLASSES) else ""
    )


def _row(files: Sequence[tuple[str, int]], place: int, below: Files) -> str:
    ends = np.cumsum([rows for _, rows in files])
    name, rows = files[(k := int(np.searchsorted(ends, place, side="right")))]
    return f"{below.where(name)}: row {place - ends[k] + rows}"


def _is_text(column: str, schema: pa.Schema, file: str) -> bool:
    kind = schema.field(column).type if column in schema.names else None
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    text = kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))
    if kind is None or not (text or pa.types.is_integer(kind)):
        raise UserError(
            f"dataset.label_column: {column!r} is no column of integers or text in {file}; columns: {_columns(schema)}; null: no labels"
        )
    return text


def _read_labels(below: Files, name: str, column: str, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        with below.open_arrow(name) as source, parquet_file(source) as opened:
            return opened.read(columns=[column], use_threads=False).column(column).cast(kind)
    except DAMAGE as error:
        raise UserError(
            f"{below.where(name)}: the column {column!r} cannot be read: {' '.join(str(error).split())}"
        ) from None


def _hugging_face_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"]))
    except (KeyError, TypeError, ValueError):  # not written by `datasets`, or not a class label
        return ()

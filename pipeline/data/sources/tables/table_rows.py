"""Rows of files with columns of Arrow, whatever their format: their images, labels and splits."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS
from firstlight.pipeline.data.sources.conventions.image_signatures import SIGNATURE_BYTES, is_image_start
from firstlight.pipeline.data.sources.conventions.parquet_columns import (
    ImageColumn,
    find_image_column,
    find_label_column,
    read_hugging_face_classes,
    require_one_column,
    take_image,
    unwrap_type,
    wrong_label_column_error,
)
from firstlight.pipeline.data.sources.conventions.reading import (
    count_things,
    describe_absent_classes,
    describe_classes,
    describe_read_files,
)
from firstlight.pipeline.data.sources.files import MAX_IMAGE_BYTES, Files, describe_too_large, hash_facts
from firstlight.pipeline.data.sources.labels import (
    CLASSES_FILE,
    LabelReading,
    is_text_type,
    read_class_names,
    read_labels,
    simplify_labels,
)
from firstlight.pipeline.data.sources.source import Record, Source, SourceFiles, SourceOptions
from firstlight.pipeline.data.sources.source_splits import (
    FileSplits,
    describe_unread,
    lay_end_to_end,
    settle_splits,
)
from firstlight.pipeline.errors import UserError, one_line

# Rows by which it is known that a column of text holds images
NUM_CHECKED_ROWS = 8
# The image of a row, " path" if the row states one, and the reason if there is no image
TableImage = tuple[bytes | None, str, str | None]


@dataclass(frozen=True)
class TableSource(Source):
    """Rows of files that have columns of Arrow, laid end to end."""

    root: Files
    # (name, number of rows) of each file
    files: tuple[tuple[str, int], ...]
    # The column of the encoded images: (column,) or (column, field)
    column: ImageColumn

    def list_files(self) -> SourceFiles:
        names = [name for name, _ in self.files] + [CLASSES_FILE] * self.root.exists(CLASSES_FILE)
        return SourceFiles(self.root, [name.encode("utf-8", "surrogateescape") for name in names])

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        start = 0
        for k, rows in group_by_part([rows for _, rows in self.files], indices):
            name, labels = self.files[k][0], self.labels[indices[start : start + len(rows)]].tolist()
            for row, label, (data, known_as, reason) in zip(
                rows.tolist(), labels, self._read_images(name, rows), strict=True
            ):
                yield Record(f"{name}#{row}{known_as}", data, label, reason)
            start += len(rows)

    @abstractmethod
    def _read_images(self, name: str, rows: np.ndarray) -> Iterator[TableImage]:
        """Yields the images of ascending rows of one file. Damage costs the rows that it makes unreadable."""


@dataclass(frozen=True)
class TableFormat:
    """Readers of a format of files, and the source of its rows."""

    source: type[TableSource]
    # (files, name) -> schema and number of rows
    read_schema: Callable[[Files, str], tuple[pa.Schema, int]]
    # (files, name, column) -> all values
    read_column: Callable[[Files, str, str], pa.ChunkedArray]
    # (files, name, column, count) -> about as many first values
    read_first_values: Callable[[Files, str, str, int], list]


def group_by_part(sizes: Sequence[int], indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (part, indices within it) for each part that holds some of the ascending `indices`.

    `sizes` has the number of entries of each part; the parts are laid end to end.
    """
    ends = np.cumsum(sizes)
    parts = np.searchsorted(ends, indices, side="right")
    for part in np.unique(parts).tolist():
        yield part, indices[parts == part] - (ends[part] - sizes[part])


def replace_damaged(name: str, count: int, values: Iterator[TableImage]) -> Iterator[TableImage]:
    """Yields `count` values: if reading fails, the remaining ones are the reason instead."""
    done = 0
    try:
        for value in values:
            yield value
            done += 1
    except DAMAGE_ERRORS as error:
        yield from [make_damaged(name, error)] * (count - done)


def make_damaged(name: str, error: BaseException) -> TableImage:
    return None, "", f"{name} cannot be read: {one_line(error, limit=1000)}"


def take_images(values: pa.Array, rows: np.ndarray, field: str) -> Iterator[TableImage]:
    """Yields the images of ascending rows of a column. `field`: that of the bytes, where the column has structs."""
    # pyarrow takes no rows of views
    for value in (values[row].as_py() for row in rows.tolist()):
        data, path, reason = take_image(value, field)
        if data is not None and len(data) > MAX_IMAGE_BYTES:
            reason = describe_too_large(len(data))
        yield data if reason is None else None, "" if path is None else f" {path}", reason


def open_tables(dataset: SourceOptions, below: Files, found: FileSplits, tables: TableFormat) -> TableSource:
    """Lists the rows of files that have columns of Arrow, laid end to end.

    Raises:
        UserError: there are no rows for training, a file cannot be read, a column is missing or has other types in
            other files, or a label is no class.
    """
    schemas, counts = zip(*(tables.read_schema(below, name) for name in found.names), strict=True)
    files = tuple(zip(found.names, counts, strict=True))
    column, note = require_one_column(
        [
            find_image_column(dataset.image_column, schema, below.get_location(name))
            for name, schema in zip(found.names, schemas, strict=True)
        ],
        dataset.image_column,
        below.get_location(),
    )
    _check_image_text(below, files, schemas, column, tables)
    read, label_note = _number_labels(dataset, below, files, schemas, tables)
    rows = lay_end_to_end(found.splits, counts)
    if "train" not in rows:
        raise UserError(f"dataset.root: no rows in {', '.join(found.splits['train'])} of {below.get_location()!r}")
    keys = [f"{name}#{row}".encode() for name, count in files for row in range(count)]
    settled = settle_splits(rows, keys, read.labels, dataset)
    facts = [below.get_facts(name) for name in found.names + [CLASSES_FILE] * below.exists(CLASSES_FILE)]
    return tables.source(
        read.classes,
        hash_facts(sorted(facts)),
        read.labels,
        settled.rows,
        below,
        files,
        column,
        reading=(
            f"{describe_read_files(sum(map(len, settled.rows.values())), {}, 'rows')} of "
            f"{count_things(len(files), 'file')}",
            *found.reading,
            *settled.reading,
            *describe_classes(read.classes, read.labels, settled.rows),
        ),
        notes=(
            *describe_unread(found.others, "as others are named for the splits"),
            *filter(None, (note, label_note)),
            *settled.notes,
            *read.notes,
            *describe_absent_classes(read.classes, read.labels, settled.rows),
        ),
        draws_test=settled.draws_test,
    )


def _check_image_text(
    below: Files,
    files: Sequence[tuple[str, int]],
    schemas: Sequence[pa.Schema],
    column: ImageColumn,
    tables: TableFormat,
) -> None:
    """Checks that a column of text holds images as Base64, by its first rows.

    Raises:
        UserError: it does not.
    """
    kind = unwrap_type(schemas[0].field(column[0]).type)
    kind = kind.field(column[1]).type if pa.types.is_struct(kind) else kind
    name = next((name for name, count in files if count), None)
    if not is_text_type(kind) or name is None:
        return
    for value in tables.read_first_values(below, name, column[0], NUM_CHECKED_ROWS):
        data, _, reason = take_image(value, column[-1])
        if value is None or (data is not None and is_image_start(data[:SIGNATURE_BYTES])):
            continue
        raise UserError(
            f"dataset.image_column: {'.'.join(column)!r} of {below.get_location(name)} is text, but no image in Base64 "
            f"({reason or 'its bytes are no image'}); valid: a column of bytes, or source: list for a column of paths"
        )


def _number_labels(
    dataset: SourceOptions,
    below: Files,
    files: Sequence[tuple[str, int]],
    schemas: Sequence[pa.Schema],
    tables: TableFormat,
) -> tuple[LabelReading, str]:
    """Returns the classes and labels, and a line if their column is called otherwise than `dataset.label_column`.

    Raises:
        UserError: the column is missing, has other types in other files, or holds a label that is no class.
    """
    column = dataset.label_column
    if column is None:
        return LabelReading((), np.full(sum(rows for _, rows in files), -1, np.int64)), ""
    parts, note = [], ""
    # Labels are text -> a file in which they are
    kinds: dict[bool, str] = {}
    for (name, _), schema in zip(files, schemas, strict=True):
        where = below.get_location(name)
        found = find_label_column(column, schema, where)
        note = note or found.note
        parts.append(_read_label_column(below, name, found.name, schema, tables))
        if parts[-1].null_count < len(parts[-1]):
            kinds.setdefault(is_text_type(parts[-1].type), where)
    if len(kinds) > 1:
        raise UserError(
            f"dataset.label_column: {column!r} has mixed types: text in {kinds[True]}, integers in {kinds[False]}"
        )
    kind = pa.string() if True in kinds else pa.int64()
    values = pa.chunked_array([chunk for part in parts for chunk in part.cast(kind).chunks], kind)
    listed = below.get_location(CLASSES_FILE) if below.exists(CLASSES_FILE) else ""
    known = read_class_names(below) or read_hugging_face_classes(schemas[0], column)
    return read_labels(values, known, lambda index: _describe_row(files, index, below), dataset, listed), note


def _describe_row(files: Sequence[tuple[str, int]], index: int, below: Files) -> str:
    ends = np.cumsum([rows for _, rows in files])
    name, rows = files[(k := int(np.searchsorted(ends, index, side="right")))]
    return f"{below.get_location(name)}: row {index - ends[k] + rows}"


def _read_label_column(below: Files, name: str, column: str, schema: pa.Schema, tables: TableFormat) -> pa.ChunkedArray:
    where = below.get_location(name)
    try:
        values = tables.read_column(below, name, column)
    except DAMAGE_ERRORS as error:
        raise UserError(f"{where}: the column {column!r} cannot be read: {one_line(error, limit=1000)}") from None
    try:
        return simplify_labels(values)
    except ValueError as error:
        raise wrong_label_column_error(column, schema, where, f" (it {error})") from None

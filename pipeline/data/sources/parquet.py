"""Parquet files of images, for example of a Hugging Face data set: train-*.parquet, test-*.parquet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS
from firstlight.pipeline.data.parquet import open_parquet_file
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
from firstlight.pipeline.data.sources.source import Record, Source, SourceFiles, SourceOptions, open_root
from firstlight.pipeline.data.sources.source_splits import (
    describe_unread,
    lay_end_to_end,
    settle_splits,
    split_files,
)
from firstlight.pipeline.errors import UserError, one_line

# The most of a row group that is in memory at a time; bytes are estimated by the mean of its rows
MAX_READ_ROWS, MAX_READ_BYTES = 128, 1 << 26
# Rows by which it is known that a column of text holds images
NUM_CHECKED_ROWS = 8
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
    column: ImageColumn

    def list_files(self) -> SourceFiles:
        names = [name for name, _ in self.files] + [CLASSES_FILE] * self.root.exists(CLASSES_FILE)
        return SourceFiles(self.root, [name.encode("utf-8", "surrogateescape") for name in names])

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
            values = batch.column(0)
            # pyarrow takes no rows of views
            for value in (values[row].as_py() for row in wanted.tolist()):
                data, path, reason = take_image(value, self.column[-1])
                if data is not None and len(data) > MAX_IMAGE_BYTES:
                    reason = describe_too_large(len(data))
                yield data if reason is None else None, "" if path is None else f" {path}", reason
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
    found = split_files(_list_parquet_files(below), dataset, repr(below.get_location()))
    schemas, counts = zip(*(_read_schema(below, name) for name in found.names), strict=True)
    files = tuple(zip(found.names, counts, strict=True))
    column, told = require_one_column(
        [
            find_image_column(dataset.image_column, schema, below.get_location(name))
            for name, schema in zip(found.names, schemas, strict=True)
        ],
        dataset.image_column,
        below.get_location(),
    )
    _check_image_text(below, files, schemas, column)
    read, label_note = _number_parquet_labels(dataset, below, files, schemas)
    rows = lay_end_to_end(found.splits, counts)
    if "train" not in rows:
        raise UserError(f"dataset.root: no rows in {', '.join(found.splits['train'])} of {below.get_location()!r}")
    keys = [f"{name}#{row}".encode() for name, count in files for row in range(count)]
    settled = settle_splits(rows, keys, read.labels, dataset)
    facts = [below.get_facts(name) for name in found.names + [CLASSES_FILE] * below.exists(CLASSES_FILE)]
    return ParquetSource(
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
            *filter(None, (told, label_note)),
            *settled.notes,
            *read.notes,
            *describe_absent_classes(read.classes, read.labels, settled.rows),
        ),
        draws_test=settled.draws_test,
    )


def _list_parquet_files(below: Files) -> list[str]:
    """Returns the files directly below the root; all at any depth if there are none.

    Raises:
        UserError: there are none at all.
    """
    names = [name for name in below.list_names() if name.lower().endswith(".parquet")]
    names = names or [name for name in below.list_tree() if name.lower().endswith(".parquet")]
    if not names:
        raise UserError(f"dataset.root: no *.parquet files in {below.get_location()!r}")
    return names


def _read_schema(below: Files, name: str) -> tuple[pa.Schema, int]:
    try:
        with below.open_arrow(name) as source, open_parquet_file(source) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except DAMAGE_ERRORS as error:
        raise UserError(
            f"{below.get_location(name)}: cannot be read as Parquet: {one_line(error, limit=1000)}"
        ) from None


def _check_image_text(
    below: Files, files: Sequence[tuple[str, int]], schemas: Sequence[pa.Schema], column: ImageColumn
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
    with below.open_arrow(name) as source, open_parquet_file(source) as opened:
        batch = next(opened.iter_batches(NUM_CHECKED_ROWS, columns=[column[0]], use_threads=False))
    for value in batch.column(0).to_pylist():
        data, _, reason = take_image(value, column[-1])
        if value is None or (data is not None and is_image_start(data[:SIGNATURE_BYTES])):
            continue
        raise UserError(
            f"dataset.image_column: {'.'.join(column)!r} of {below.get_location(name)} is text, but no image in Base64 "
            f"({reason or 'its bytes are no image'}); valid: a column of bytes, or source: list for a column of paths"
        )


def _number_parquet_labels(
    dataset: SourceOptions, below: Files, files: Sequence[tuple[str, int]], schemas: Sequence[pa.Schema]
) -> tuple[LabelReading, str]:
    """Returns the classes and labels, and a line if their column is called otherwise than `dataset.label_column`.

    Raises:
        UserError: the column is missing, has other types in other files, or holds a label that is no class.
    """
    column = dataset.label_column
    if column is None:
        return LabelReading((), np.full(sum(rows for _, rows in files), -1, np.int64)), ""
    parts, told = [], ""
    # Labels are text -> a file in which they are
    kinds: dict[bool, str] = {}
    for (name, _), schema in zip(files, schemas, strict=True):
        where = below.get_location(name)
        found = find_label_column(column, schema, where)
        told = told or found.told
        parts.append(_read_label_column(below, name, found.name, schema))
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
    return read_labels(values, known, lambda index: _describe_row(files, index, below), dataset, listed), told


def _describe_row(files: Sequence[tuple[str, int]], index: int, below: Files) -> str:
    ends = np.cumsum([rows for _, rows in files])
    name, rows = files[(k := int(np.searchsorted(ends, index, side="right")))]
    return f"{below.get_location(name)}: row {index - ends[k] + rows}"


def _read_label_column(below: Files, name: str, column: str, schema: pa.Schema) -> pa.ChunkedArray:
    where = below.get_location(name)
    try:
        with below.open_arrow(name) as source, open_parquet_file(source) as opened:
            values = opened.read(columns=[column], use_threads=False).column(column)
    except DAMAGE_ERRORS as error:
        raise UserError(f"{where}: the column {column!r} cannot be read: {one_line(error, limit=1000)}") from None
    try:
        return simplify_labels(values)
    except ValueError as error:
        raise wrong_label_column_error(column, schema, where, f" (it {error})") from None

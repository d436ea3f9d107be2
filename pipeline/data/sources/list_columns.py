"""The columns of a list of image files, parsed from CSV, TSV, JSON lines or Parquet."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from json import loads as parse

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS
from firstlight.pipeline.data.parquet import read_parquet_table
from firstlight.pipeline.data.sources.conventions.column_names import (
    DEFAULT_COLUMNS,
    LABEL_COLUMNS,
    PATH_COLUMNS,
    SPLIT_COLUMNS,
    FoundColumn,
    find_column,
    plain_name,
)
from firstlight.pipeline.data.sources.conventions.image_signatures import IMAGE_SUFFIXES, find_ending
from firstlight.pipeline.data.sources.conventions.reading import join_names, show_name
from firstlight.pipeline.data.sources.conventions.split_names import find_value_splits
from firstlight.pipeline.data.sources.conventions.text_tables import read_text_table
from firstlight.pipeline.data.sources.labels import is_label_type, is_text_type
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError, one_line

# Suffix of a list -> the delimiter of its columns, "" if the format has none
LIST_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": ""}
# A row with more brackets is parsed by Python first, see `_check_json_rows`
MAX_ROW_BRACKETS = 1000
# Rows by which a column without a name is known
SAMPLED_PATHS = 100


@dataclass
class ListColumns:
    """The column `path`, and `label` and `split` if there are any; the encoding of the text; notes."""

    table: pa.Table
    encoding: str = "utf-8"
    reading: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_list_columns(dataset: SourceOptions, data: bytes, where: str) -> ListColumns:
    """Reads the columns of a list. `where` is the list, for messages.

    Raises:
        UserError: the list cannot be parsed, or a column is missing or has another type.
    """
    suffix = posixpath.splitext(where)[1].lower()
    try:
        found, has_header = _parse_list(data, suffix, dataset)
    except (*DAMAGE_ERRORS, LookupError) as error:
        raise UserError(f"dataset.list: {where}: cannot be read: {one_line(error)}") from None
    table, chosen = found.table, dict[str, str]()
    names = [name.strip() for name in table.column_names]
    table = table.rename_columns(names)
    for column in _find_columns(dataset, table, has_header, where).items():
        chosen[column[0]] = column[1].name
        found.notes += [column[1].note] if column[1].note else []
    if others := [name or "one without a name" for name in names if name not in chosen.values()]:
        read = ", ".join(show_name(name) for name in chosen.values())
        found.reading.append(f"columns read: {read}; left out: {join_names(others)}")
    found.table = table.select(list(chosen.values())).rename_columns(list(chosen))
    return found


def _find_columns(dataset: SourceOptions, table: pa.Table, has_header: bool, where: str) -> dict[str, FoundColumn]:
    """Returns the columns of paths, labels and splits, as far as they are asked for or there for certain."""
    keys = {"path": dataset.path_column, "label": dataset.label_column, "split": dataset.split_column}
    usual = {"path": PATH_COLUMNS, "label": LABEL_COLUMNS, "split": SPLIT_COLUMNS}
    found: dict[str, FoundColumn] = {}
    for column, key in keys.items():
        if key is None:
            continue
        wanted = f"dataset.{column}_column"
        taken = {one.name for one in found.values()}
        one = find_column(key, table.column_names, wanted, usual[column], lambda name: name not in taken)  # noqa: B023
        if one is None and not has_header and key in DEFAULT_COLUMNS:
            one = _find_by_values(column, table, taken, wanted)
        if one is None or not _has_type(column, table, one.name):
            raise _missing_column_error(column, key if one is None else one.name, table, where)
        found[column] = one
    if dataset.split_column is None and dataset.splits is None and (guessed := _guess_split_column(table, found)):
        found["split"] = guessed
    return found


def _find_by_values(column: str, table: pa.Table, taken: set[str], key: str) -> FoundColumn | None:
    """Returns the column of a table without header that holds paths of images, or the only one besides."""
    names = [name for name in table.column_names if name not in taken]
    heads = {name: [str(value) for value in table[name].slice(0, SAMPLED_PATHS).to_pylist()] for name in names}
    if column == "path":
        near = [name for name in names if all(find_ending(text.strip()) in IMAGE_SUFFIXES for text in heads[name])]
    else:
        near = [name for name in names if not _is_index(heads[name])]
    if len(near) != 1:
        return None
    example = show_name((heads[near[0]] or [""])[0])
    return FoundColumn(near[0], f"{key}: column {near[0]} is taken, e.g. {example!r}")


def _is_index(texts: Sequence[str]) -> bool:
    """Returns True for 0, 1, 2, ... or 1, 2, 3, ... of more than two rows."""
    return len(texts) > 2 and any(texts == [str(k + first) for k in range(len(texts))] for first in (0, 1))


def _guess_split_column(table: pa.Table, found: dict[str, FoundColumn]) -> FoundColumn | None:
    """Returns the only other column with a usual name whose values all name splits, the training split among them."""
    taken = {one.name for one in found.values()}
    near = []
    for name in table.column_names:
        if name in taken or plain_name(name) not in SPLIT_COLUMNS or table.column_names.count(name) > 1:
            continue
        if not _has_type("split", table, name):
            continue
        values = {str(value).strip() for value in pc.unique(table[name].cast(pa.string())).to_pylist() if value}
        splits = find_value_splits(values)
        near += [name] if values and len(splits) == len(values) and "train" in splits.values() else []
    if len(near) != 1:
        return None
    return FoundColumn(near[0], f"the column {near[0]!r} is read as the splits; dataset.splits={{}} ignores it")


def _has_type(column: str, table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    if column == "label":
        return is_label_type(kind)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return is_text_type(kind) or (column == "path" and is_binary) or (column == "split" and pa.types.is_integer(kind))


def _missing_column_error(column: str, key: str, table: pa.Table, where: str) -> UserError:
    columns = ", ".join(f"{show_name(one.name)} ({_describe_type(one.type)})" for one in table.schema)
    valid = "integers or text" if column == "label" else "text"
    none = "; null: no labels" if column == "label" else ""
    return UserError(
        f"dataset.{column}_column: {key!r} is no column of {valid} in {where}; columns: {columns or 'none'}{none}"
    )


def _describe_type(kind: pa.DataType) -> str:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return "text" if is_text_type(kind) or pa.types.is_binary(kind) else str(kind)


def _parse_list(data: bytes, suffix: str, dataset: SourceOptions) -> tuple[ListColumns, bool]:
    """Parses the data of a list. Returns its columns, and whether they have names of their own."""
    if suffix == ".parquet":
        return ListColumns(read_parquet_table(pa.BufferReader(data))), True
    if not LIST_DELIMITERS[suffix]:
        # Spreadsheets write a byte order mark
        data = data.removeprefix(b"\xef\xbb\xbf")
        _check_json_rows(data)
        return ListColumns(json.read_json(pa.BufferReader(data))), True
    wanted = {plain_name(dataset.path_column)} | (PATH_COLUMNS if dataset.path_column in DEFAULT_COLUMNS else set())

    def is_header(row: Sequence[str]) -> bool:
        return bool({plain_name(name) for name in row} & wanted)

    text = read_text_table(data, LIST_DELIMITERS[suffix], dataset.encoding, dataset.delimiter, is_header)
    return ListColumns(text.table, text.encoding, text.reading, text.notes), text.has_header


def _check_json_rows(data: bytes) -> None:
    """Checks that every row of JSON lines is one object, and parses rows with many brackets.

    The parser of pyarrow ends the process if values are nested some ten thousand levels deep, on one line or over many.

    Raises:
        ValueError: a row is no JSON object on a line of its own.
        RecursionError: a row is nested too deep.
    """
    for number, line in enumerate(data.splitlines()):
        row = line.strip()
        if row and not (row.startswith(b"{") and row.endswith(b"}")):
            raise ValueError(f"row {number} is no JSON object on a line of its own")
        if row.count(b"[") + row.count(b"{") > MAX_ROW_BRACKETS:
            parse(row)

"""The columns of a list of image files, parsed from CSV, TSV, JSON lines or Parquet."""

import posixpath
from json import loads as parse

import pyarrow as pa
from pyarrow import csv, json

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS
from firstlight.pipeline.data.parquet import read_parquet_table
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError, one_line

# Suffix of a list -> the delimiter of its columns, "" if the format has none
LIST_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": ""}
# A row with more brackets is parsed by Python first, see `_check_json_rows`
MAX_ROW_BRACKETS = 1000


def parse_list_columns(dataset: SourceOptions, data: bytes, where: str) -> pa.Table:
    """Returns the column `path`, and `label` and `split` if the config names them. `where` is the list, for messages.

    Raises:
        UserError: the list cannot be parsed, or a column is missing or has another type.
    """
    keys = {"path": dataset.path_column, "label": dataset.label_column, "split": dataset.split_column}
    wanted = {column: key for column, key in keys.items() if key is not None}
    try:
        table = _parse_list(data, posixpath.splitext(where)[1].lower(), [dataset.label_column, dataset.split_column])
    except DAMAGE_ERRORS as error:
        raise UserError(f"dataset.list: {where}: cannot be read: {one_line(error)}") from None
    for column, key in wanted.items():
        kind = table.schema.field(key).type if table.column_names.count(key) == 1 else pa.null()
        if not (
            _is_text_type(kind)
            or (column == "label" and pa.types.is_integer(kind))
            or (column == "path" and pa.types.is_binary(kind))
        ):
            columns = ", ".join(f"{field.name} ({_describe_type(field.type)})" for field in table.schema)
            valid = "integers or text" if column == "label" else "text"
            raise UserError(
                f"dataset.{column}_column: {key!r} is no column of {valid} in {where}; columns: {columns or 'none'}"
            )
    return table.select(list(wanted.values())).rename_columns(list(wanted))


def _describe_type(kind: pa.DataType) -> str:
    return "text" if _is_text_type(kind) or pa.types.is_binary(kind) else str(kind)


def _is_text_type(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parse_list(data: bytes, suffix: str, texts: list[str | None]) -> pa.Table:
    """Parses the data of a list. `texts` are columns of CSV that must be UTF-8; paths need not be."""
    # Spreadsheets write a byte order mark
    data = data.removeprefix(b"\xef\xbb\xbf")
    source = pa.BufferReader(data)
    if suffix == ".parquet":
        return read_parquet_table(source)
    if not LIST_DELIMITERS[suffix]:
        _check_json_rows(data)
        return json.read_json(source)
    # pyarrow names a wrong row only without threads
    options = csv.ReadOptions(use_threads=False)
    layout = csv.ParseOptions(delimiter=LIST_DELIMITERS[suffix], newlines_in_values=True)
    names = csv.open_csv(pa.BufferReader(data), read_options=options, parse_options=layout).schema.names
    kinds = csv.ConvertOptions(
        column_types={name: pa.string() if name in texts else pa.binary() for name in names},
        null_values=[""],
        strings_can_be_null=True,
    )
    return csv.read_csv(source, read_options=options, parse_options=layout, convert_options=kinds)


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

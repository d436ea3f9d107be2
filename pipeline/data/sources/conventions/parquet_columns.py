"""The columns of Parquet files that hold images and labels, whatever types the writer has given them."""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from firstlight.pipeline.data.sources.conventions.column_names import (
    DEFAULT_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    FoundColumn,
    find_column,
)
from firstlight.pipeline.data.sources.conventions.reading import show_name
from firstlight.pipeline.data.sources.labels import is_label_type, is_text_type
from firstlight.pipeline.errors import UserError

# A column of images, and the field of its structs
ImageColumn = tuple[str, ...]
NO_IMAGE_REASON = "the row has no image (null)"
DATA_URI_MARK = ";base64,"


def is_bytes_type(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def unwrap_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type of the values of lists and dictionaries."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_dictionary)
    while any(is_of_kind(kind) for is_of_kind in lists):
        kind = kind.value_type
    return kind


def find_image_column(column: str, schema: pa.Schema, file: str) -> tuple[ImageColumn, str]:
    """Returns the column of the encoded images, and a line if it is called otherwise than `column`.

    It has bytes, text (Base64), or structs with one of both: in the field after the dot of `column`, or in `bytes`.
    Each may be in lists of one, or in a dictionary.

    Raises:
        UserError: there is no such column in `file`.
    """
    top, _, field = (column, "", "") if column in schema.names else column.partition(".")
    found: FoundColumn | None = FoundColumn(top) if top in schema.names else None
    if found is None and not field:
        found = find_column(
            column, schema.names, "dataset.image_column", IMAGE_COLUMNS, lambda name: _holds_images(name, "", schema)
        )
    if found is None and column in DEFAULT_COLUMNS:
        near = [name for name in schema.names if _holds_images(name, "", schema) and not _is_text(name, schema)]
        note = f"dataset.image_column: there is no {column!r}, {near[0]!r} is taken" if near else ""
        found = FoundColumn(near[0], note) if len(near) == 1 else None
    if found is None or not _holds_images(found.name, field, schema):
        raise UserError(
            f"dataset.image_column: {column!r} is no column of bytes, or of structs with a field 'bytes', in {file}; "
            f"columns: {describe_columns(schema)}"
        )
    if pa.types.is_struct(unwrap_type(schema.field(found.name).type)):
        return (found.name, field or "bytes"), found.note
    return (found.name,), found.note


def _holds_images(name: str, field: str, schema: pa.Schema) -> bool:
    if schema.names.count(name) != 1:
        return False
    kind = unwrap_type(schema.field(name).type)
    if pa.types.is_struct(kind):
        field = field or "bytes"
        kind = kind.field(field).type if kind.get_field_index(field) >= 0 else pa.null()
    elif field:
        return False
    return is_bytes_type(kind) or is_text_type(kind)


def _is_text(name: str, schema: pa.Schema) -> bool:
    return is_text_type(unwrap_type(schema.field(name).type))


def describe_columns(schema: pa.Schema) -> str:
    return ", ".join(f"{show_name(field.name)} ({field.type})" for field in schema)


def take_image(value: Any, field: str) -> tuple[bytes | None, str | None, str | None]:
    """Returns the encoded image of a cell, the path that it states, and the reason if there is no image."""
    path = None
    if isinstance(value, list):
        if len(value) > 1:
            return None, None, f"the row has {len(value)} images"
        value = value[0] if value else None
    if isinstance(value, dict):
        value, path = value.get(field), value.get("path")
    if isinstance(value, str):
        try:
            value = decode_image_text(value)
        except ValueError as error:
            return None, path, str(error)
    return value, path if isinstance(path, str) else None, NO_IMAGE_REASON if value is None else None


def decode_image_text(text: str) -> bytes:
    """Returns the bytes that a Base64 text, or a data URI of one, stands for.

    Raises:
        ValueError: it is no Base64.
    """
    plain = text.partition(DATA_URI_MARK)[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(
            "".join(plain.split()), altchars=b"-_" if {"-", "_"} & set(plain) else None, validate=True
        )
    except (binascii.Error, ValueError):
        raise ValueError(f"is text that is no Base64: {show_name(text[:60])}") from None


def find_label_column(column: str, schema: pa.Schema, file: str) -> FoundColumn:
    """Returns the column of the labels.

    Raises:
        UserError: there is no such column in `file`, or its type is none of labels.
    """
    found = find_column(
        column,
        schema.names,
        "dataset.label_column",
        LABEL_COLUMNS,
        lambda name: is_label_type(schema.field(name).type),
    )
    if found is None or not is_label_type(schema.field(found.name).type):
        raise wrong_label_column_error(column, schema, file)
    return found


def wrong_label_column_error(column: str, schema: pa.Schema, file: str, why: str = "") -> UserError:
    return UserError(
        f"dataset.label_column: {column!r} is no column of integers or text{why} in {file}; "
        f"columns: {describe_columns(schema)}; null: no labels"
    )


def read_hugging_face_classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Returns the names of the classes that the library `datasets` writes into the schema; () if there are none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"]))
    # The file was not written by `datasets`, or the column is no class label
    except (KeyError, TypeError, ValueError):
        return ()


def require_one_column(found: Sequence[tuple[ImageColumn, str]], column: str, where: str) -> tuple[ImageColumn, str]:
    """Returns the only column of images of several files.

    Raises:
        UserError: it has other names or types in other files.
    """
    if len({one for one, _ in found}) > 1:
        raise UserError(f"dataset.image_column: {column!r} is not of one type in all files of {where!r}")
    return found[0]

"""Opens Parquet files, and refuses columns of Arrow with types other than Arrow's own.

Ray registers an extension type whose values are pickles, which are unpickled by whoever reads them.

Arrays of numbers and of texts are made here too, without pandas, which `pa.array` imports to ask whether values are its
own: that takes a third of a second.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet_file(source: Any, **options: Any) -> pq.ParquetFile:
    """Opens a file, given its path or an open file. Pages are checked against their checksums as they are read.

    Raises:
        pa.ArrowInvalid: the file is not Parquet, or a column has a foreign type; the message names the column.
    """
    file = pq.ParquetFile(source, page_checksum_verification=True, **options)
    try:
        refuse_foreign_types(file.schema_arrow)
    except pa.ArrowInvalid:
        file.close()
        raise
    return file


def refuse_foreign_types(schema: pa.Schema) -> None:
    """Checks that all columns have Arrow's own types.

    Raises:
        pa.ArrowInvalid: one has not; the message names the column.
    """
    for field in schema:
        if _is_foreign(field.type):
            name = field.type.extension_name if _is_extension(field.type) else field.type
            raise pa.ArrowInvalid(f"the column {field.name!r} has the foreign type {name}")


def read_parquet_table(source: Any, columns: list[str] | None = None) -> pa.Table:
    """Reads a whole file, or some of its columns.

    Raises:
        pa.ArrowInvalid: see `open_parquet_file`.
    """
    with open_parquet_file(source) as file:
        return file.read(columns=columns, use_threads=False)


def _is_extension(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


def _is_foreign(kind: pa.DataType) -> bool:
    """Returns True for an extension type and for a nested type that contains one."""
    return _is_extension(kind) or any(_is_foreign(kind.field(k).type) for k in range(kind.num_fields))


def make_numbers(values: Sequence[int], kind: type[np.integer]) -> pa.Array:
    """Returns an array of integers, as `pa.array` does."""
    found = np.array(values, kind)
    return pa.Array.from_buffers(pa.from_numpy_dtype(found.dtype), len(found), [None, pa.py_buffer(found)])


def make_texts(values: Sequence[bytes], type_: pa.DataType) -> pa.Array:
    """Returns an array of bytes or, if they are in UTF-8, of strings, as `pa.array` does."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        # One array holds no more; this becomes several.
        return pa.array(values, type_)
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(type_, len(values), buffers)

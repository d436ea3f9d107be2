"""Parquet files opened, and refused where a column has a type that is none of Arrow's own: Ray brings one whose values are pickles, and are unpickled
by whoever looks at them."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def parquet_file(source: Any, **options: Any) -> pq.ParquetFile:
    """A file by path, or open; pages are checked against their sums as they are read.

    Raises:
        pa.ArrowInvalid: it is no Parquet, or a column is of a foreign type; names it.
    """
    file = pq.ParquetFile(source, page_checksum_verification=True, **options)
    for field in file.schema_arrow:
        if _foreign(field.type):
            file.close()
            raise pa.ArrowInvalid(
                f"the column {field.name!r} has the foreign type {field.type.extension_name if _own(field.type) else field.type}"
            )
    return file


def parquet_table(source: Any, columns: list[str] | None = None) -> pa.Table:
    """A whole file, or some of its columns.

    Raises:
        pa.ArrowInvalid: as `parquet_file`.
    """
    with parquet_file(source) as file:
        return file.read(columns=columns, use_threads=False)


def _own(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


def _foreign(kind: pa.DataType) -> bool:
    """Of an extension, by itself or somewhere within."""
    return _own(kind) or any(_foreign(kind.field(k).type) for k in range(kind.num_fields))

"""Parquet files of images, for example of a Hugging Face data set: train-*.parquet, test-*.parquet."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS
from firstlight.pipeline.data.parquet import open_parquet_file
from firstlight.pipeline.data.sources.files import Files
from firstlight.pipeline.data.sources.source import SourceOptions, open_root
from firstlight.pipeline.data.sources.source_splits import split_files
from firstlight.pipeline.data.sources.tables.table_rows import (
    TableFormat,
    TableImage,
    TableSource,
    group_by_part,
    make_damaged,
    open_tables,
    replace_damaged,
    take_images,
)
from firstlight.pipeline.errors import UserError, one_line

# The most of a row group that is in memory at a time; bytes are estimated by the mean of its rows
MAX_READ_ROWS, MAX_READ_BYTES = 128, 1 << 26


@dataclass(frozen=True)
class ParquetSource(TableSource):
    """Rows of Parquet files, laid end to end."""

    kind = "parquet"

    def _read_images(self, name: str, rows: np.ndarray) -> Iterator[TableImage]:
        """Yields the images of ascending rows of one file. Damage costs the rows of its row group from there on."""
        try:
            source = self.root.open_arrow(name)
            file = open_parquet_file(source, pre_buffer=False, buffer_size=2**20)
        except DAMAGE_ERRORS as error:
            yield from [make_damaged(name, error)] * len(rows)
            return
        with source, file:
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
            for group, within in group_by_part(sizes, rows):
                yield from replace_damaged(name, len(within), self._read_row_group(file, group, within))

    def _read_row_group(self, file: pq.ParquetFile, group: int, rows: np.ndarray) -> Iterator[TableImage]:
        """Yields the images of ascending rows of one row group, of which a small part is in memory at a time."""
        facts = file.metadata.row_group(group)
        count = min(MAX_READ_ROWS, max(1, MAX_READ_BYTES * facts.num_rows // max(facts.total_byte_size, 1)))
        start = 0
        for batch in file.iter_batches(count, row_groups=[group], columns=[self.column[0]], use_threads=False):
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            yield from take_images(batch.column(0), wanted, self.column[-1])
            start += len(batch)


def open_parquet(dataset: SourceOptions) -> TableSource:
    """Lists the rows of the Parquet files below `dataset.root`.

    Raises:
        UserError: there are no rows for training, a file cannot be read, a column is missing or has other types in
            other files, or a label is no class.
    """
    below = open_root(dataset.root, dataset.source)
    found = split_files(list_parquet_files(below), dataset, repr(below.get_location()))
    return open_tables(dataset, below, found, PARQUET_TABLES)


def list_parquet_files(below: Files) -> list[str]:
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


def _read_parquet_column(below: Files, name: str, column: str) -> pa.ChunkedArray:
    with below.open_arrow(name) as source, open_parquet_file(source) as opened:
        return opened.read(columns=[column], use_threads=False).column(column)


def _read_first_values(below: Files, name: str, column: str, count: int) -> list:
    with below.open_arrow(name) as source, open_parquet_file(source) as opened:
        return list(next(opened.iter_batches(count, columns=[column], use_threads=False)).column(0).to_pylist())


PARQUET_TABLES = TableFormat(ParquetSource, _read_schema, _read_parquet_column, _read_first_values)

"""Folders that the library `datasets` writes with `save_to_disk`: Arrow files, of one data set or of several splits.

They are read without that library. Nothing in such a folder is code, and what it says of code is not read.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.manifest import DAMAGE_ERRORS
from firstlight.pipeline.data.parquet import refuse_foreign_types
from firstlight.pipeline.data.sources.files import Files, LocalFiles
from firstlight.pipeline.data.sources.source import SourceOptions, open_local_root
from firstlight.pipeline.data.sources.source_splits import split_files
from firstlight.pipeline.data.sources.tables.table_rows import (
    TableFormat,
    TableImage,
    TableSource,
    make_damaged,
    open_tables,
    replace_damaged,
    take_images,
)
from firstlight.pipeline.errors import UserError, one_line

# The file with the names of the splits of a folder, and the file with the names of the files of a data set
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"


@dataclass(frozen=True)
class ArrowFolderSource(TableSource):
    """Rows of Arrow files on disk, laid end to end."""

    kind = "hugging_face"

    def _read_images(self, name: str, rows: np.ndarray) -> Iterator[TableImage]:
        yield from replace_damaged(name, len(rows), self._read_batches(name, rows))

    def _read_batches(self, name: str, rows: np.ndarray) -> Iterator[TableImage]:
        start = 0
        with _open_stream(self.root, name) as batches:
            for batch in batches:
                wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
                if len(wanted):
                    values = batch.column(self.column[0])
                    # A damaged offset would be read outside of the file.
                    values.validate(full=True)
                    yield from take_images(values, wanted, self.column[-1])
                start += len(batch)
                if start > rows[-1]:
                    return
        yield from [make_damaged(name, ValueError("it has fewer rows than when it was listed"))] * int(
            (rows >= start).sum()
        )


@contextmanager
def _open_stream(below: Files, name: str) -> Iterator[pa.ipc.RecordBatchStreamReader]:
    """Opens an Arrow file in memory that is mapped, in which a batch that is passed over is not read."""
    with pa.memory_map(below.get_location(name)) as source, pa.ipc.open_stream(source) as reader:
        refuse_foreign_types(reader.schema)
        yield reader


def open_arrow_folder(dataset: SourceOptions) -> TableSource:
    """Lists the rows of the folder `dataset.root`, which `save_to_disk` has written.

    Raises:
        UserError: it is no such folder, a file cannot be read, a column is missing, or a label is no class.
    """
    folder = open_local_root(dataset)
    below = LocalFiles(folder)
    found = split_files(_list_arrow_files(folder), dataset, repr(str(folder)))
    return open_tables(dataset, below, found, ARROW_TABLES)


def _list_arrow_files(folder: Path) -> list[str]:
    """Returns the files with the rows of a data set, or of all splits of several, relative to the folder."""
    splits = _read_json_object(folder / SPLITS_FILE)
    if splits is not None:
        names = _take_names(splits.get("splits"), folder / SPLITS_FILE)
        return [f"{name}/{file}" for name in names for file in _list_split_files(folder / name)]
    return _list_split_files(folder)


def _list_split_files(folder: Path) -> list[str]:
    state = _read_json_object(folder / STATE_FILE)
    if state is None:
        raise UserError(
            f"dataset.root: {str(folder)!r} has no {SPLITS_FILE} or {STATE_FILE}; valid: hf://owner/name, "
            "or a folder that save_to_disk of the library datasets has written"
        )
    if state.get("_indices_files"):
        raise UserError(
            f"{folder / STATE_FILE}: the rows are chosen by a table of indices, as an old version of datasets wrote "
            "it; valid: what save_to_disk writes after flatten_indices()"
        )
    entries = state.get("_data_files")
    files = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return _take_names(files, folder / STATE_FILE)


def _read_json_object(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is damaged: {one_line(error, 80)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is damaged: no object of JSON")
    return found


def _take_names(names: Any, file: Path) -> list[str]:
    """Returns a list of names, each of something directly in the folder of `file`."""
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: is damaged: it names no files")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{file}: {str(name)[:80]!r} is no name of a file in this folder")
    return names


def _read_arrow_schema(below: Files, name: str) -> tuple[pa.Schema, int]:
    try:
        with _open_stream(below, name) as batches:
            return batches.schema, sum(len(batch) for batch in batches)
    except DAMAGE_ERRORS as error:
        raise UserError(f"{below.get_location(name)}: cannot be read as Arrow: {one_line(error, limit=1000)}") from None


def _read_arrow_column(below: Files, name: str, column: str) -> pa.ChunkedArray:
    with _open_stream(below, name) as batches:
        values = [batch.column(column) for batch in batches]
        found = pa.chunked_array(values, batches.schema.field(column).type)
        found.validate(full=True)
        # The values are copied, as the mapped file is closed
        return pa.chunked_array([pa.concat_arrays([chunk, chunk[:0]]) for chunk in found.chunks], found.type)


def _read_first_arrow_values(below: Files, name: str, column: str, count: int) -> list:
    with _open_stream(below, name) as batches:
        values = next((batch.column(column)[:count] for batch in batches if len(batch)), None)
        if values is None:
            return []
        values.validate(full=True)
        return list(values.to_pylist())


ARROW_TABLES = TableFormat(ArrowFolderSource, _read_arrow_schema, _read_arrow_column, _read_first_arrow_values)

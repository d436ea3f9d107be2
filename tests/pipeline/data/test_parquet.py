"""Parquet files are refused if a column has an extension type, and read with their checksums."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.parquet import make_numbers, make_texts, open_parquet_file, read_parquet_table


class ForeignType(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.binary(), "tests.foreign")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "ForeignType":
        return cls()


@pytest.mark.parametrize("nested", [False, True])
def test_column_of_extension_type_is_refused_by_name(tmp_path: Path, nested: bool) -> None:
    pa.register_extension_type(ForeignType())
    try:
        values = pa.ExtensionArray.from_storage(ForeignType(), pa.array([b"x"]))
        column = pa.StructArray.from_arrays([values], ["inner"]) if nested else values
        pq.write_table(pa.table({"a": [1], "b": column}), tmp_path / "f.parquet")
        with pytest.raises(pa.ArrowInvalid, match=r"the column 'b' has the foreign type .*tests\.foreign"):
            open_parquet_file(tmp_path / "f.parquet")
        with pytest.raises(pa.ArrowInvalid, match="'b'"):
            read_parquet_table(tmp_path / "f.parquet")
    finally:
        pa.unregister_extension_type("tests.foreign")


def test_table_has_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), tmp_path / "f.parquet")
    assert read_parquet_table(tmp_path / "f.parquet", ["b"]).to_pydict() == {"b": ["x", "y"]}
    assert read_parquet_table(tmp_path / "f.parquet").column_names == ["a", "b"]


def test_changed_page_fails_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    table = pa.table({"a": [b"content of a page" * 10]})
    layout = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(table, file, compression="none", **layout)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"content of a page", b"Content of a page", 1))
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        read_parquet_table(file)


@pytest.mark.parametrize("values", [[], [3], [0, -(2**63), 2**63 - 1]])
def test_numbers_are_those_of_arrow(values: list[int]) -> None:
    assert make_numbers(values, np.int64).equals(pa.array(values, pa.int64()))
    assert make_numbers([2**64 - 1], np.uint64).equals(pa.array([2**64 - 1], pa.uint64()))


@pytest.mark.parametrize("values", [[], [b""], [b"a", b"", "gr\u00fcn".encode()]])
@pytest.mark.parametrize("type_", [pa.binary(), pa.string()])
def test_texts_are_those_of_arrow(values: list[bytes], type_: pa.DataType) -> None:
    found = make_texts(values, type_)
    found.validate(full=True)
    assert found.equals(pa.array(values, type_))


def test_arrays_need_no_pandas() -> None:
    code = (
        "import sys, numpy, pyarrow; from firstlight.pipeline.data.parquet import make_numbers, make_texts;"
        "make_numbers([1], numpy.int64), make_texts([b'a'], pyarrow.string()); print('pandas' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "False\n", ran.stderr

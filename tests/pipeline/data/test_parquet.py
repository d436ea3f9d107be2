"""Parquet files are refused if a column has an extension type, and read with their checksums."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.parquet import open_parquet_file, read_parquet_table


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

"""Tables as text: encodings, delimiters, spaces, headers and index columns."""

from collections.abc import Sequence

import pyarrow as pa
import pytest

from firstlight.pipeline.data.sources.conventions.text_tables import (
    TextTable,
    decode_text,
    find_dialect,
    read_text_table,
)

ROWS = [("path", "label"), ("im/0.jpg", "Käse"), ("im/1.jpg", "Brötchen, süß")]


def is_header(row: Sequence[str]) -> bool:
    return "path" in [name.strip() for name in row]


def read(data: bytes, default: str = ",", encoding: str | None = None, delimiter: str | None = None) -> TextTable:
    return read_text_table(data, default, encoding, delimiter, is_header)


def rows_of(table: TextTable) -> list[tuple[str, ...]]:
    names = [name.strip() for name in table.table.column_names]
    return [tuple(names), *(tuple(row.values()) for row in table.table.to_pylist())]


def write(delimiter: str) -> str:
    return "\n".join(
        delimiter.join(f'"{cell}"' if delimiter in cell or "," in cell else cell for cell in row) for row in ROWS
    )


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"]
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encoding_and_delimiter_are_found(encoding: str, delimiter: str) -> None:
    found = read(write(delimiter).encode(encoding))
    assert rows_of(found) == ROWS
    assert bool(found.reading) == (delimiter != "," or encoding != "utf-8")
    assert bool(found.notes) == (encoding in ("cp1252", "latin-1", "utf-16-le", "utf-16-be"))


def test_guessed_encoding_shows_examples_and_the_key() -> None:
    (note,) = read(write(",").encode("cp1252")).notes
    assert note == (
        "encoding cp1252, guessed, as the text is not UTF-8: Käse, Brötchen, süß; dataset.encoding settles it"
    )
    russian = "path,label\n" + "\n".join(f"{k}.jpg,{'кошка' if k % 2 else 'собака'}" for k in range(20))
    assert rows_of(read(russian.encode("cp1251")))[1:3] == [("0.jpg", "собака"), ("1.jpg", "кошка")]
    assert rows_of(read(russian.encode("koi8-r"), encoding="koi8-r"))[1] == ("0.jpg", "собака")


def test_text_in_another_encoding_than_given_raises() -> None:
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"caf\xe9", "utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path, label\na.jpg, cat\nb.jpg, dog\n", [("a.jpg", "cat"), ("b.jpg", "dog")]),
        ('path, label\n"a.jpg", "big, cat"\n"b.jpg", "dog"\n', [("a.jpg", "big, cat"), ("b.jpg", "dog")]),
        ("'path';'label'\n'a.jpg';'cat'\n'b.jpg';'dog'\n", [("a.jpg", "cat"), ("b.jpg", "dog")]),
        ("sep=;\npath;label\na.jpg;cat\n", [("a.jpg", "cat")]),
        ("path,label\r\na.jpg,cat\r\n\r\nb.jpg,\r\n", [("a.jpg", "cat"), ("b.jpg", None)]),
        ('path,label\n"a ""b"".jpg",cat\n"c\nd.jpg",dog\n', [('a "b".jpg', "cat"), ("c\nd.jpg", "dog")]),
        ("path\na.jpg\nb c.jpg\n", [("a.jpg",), ("b c.jpg",)]),
        ("label;path\nx,y;a.jpg\n", [("x,y", "a.jpg")]),
    ],
)
def test_dialects(text: str, expected: list[tuple[str | None, ...]]) -> None:
    assert rows_of(read(text.encode()))[1:] == expected


def test_column_named_by_header_decides_over_the_sniffer() -> None:
    assert find_dialect("path,label\na;b;c.jpg,x;y\nd;e;f.jpg,z;w\n", ",", None, is_header).delimiter == ","
    assert find_dialect("path;label\n", ",", "|", is_header).delimiter == "|"


def test_missing_header_and_index_column_are_reported() -> None:
    found = read(b"im/0.jpg,cat\nim/1.jpg,dog\n")
    assert (found.has_header, found.table.column_names) == (False, ["0", "1"])
    assert found.notes == ["no header: the first row is im/0.jpg, cat; columns are called 0, 1, ..."]
    assert len(found.table) == 2
    found = read(b"path,label\n0,im/0.jpg,cat\n1,im/1.jpg,dog\n")
    assert found.table.to_pylist()[1] == {"": "1", "path": "im/1.jpg", "label": "dog"}
    assert found.notes == ["the first column has no name: taken as an index"]


def test_row_of_another_length_is_named() -> None:
    with pytest.raises(pa.ArrowInvalid, match=r"Row #3: Expected 2 columns, got 1"):
        read(b"path,label\na.jpg,cat\nb.jpg\n")

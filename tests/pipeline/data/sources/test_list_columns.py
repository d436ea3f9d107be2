"""The columns of a list: missing ones, wrong types, and rows that are nested too deep."""

from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from tests.support.image_sources import open_list_set, write_csv


def test_deeply_nested_row_raises(tmp_path: Path) -> None:
    rows = '{"path": "1.jpg", "label": %s}\n'
    file = write_csv(tmp_path, rows % ("[" * 50_000 + "]" * 50_000), "list.jsonl")
    with pytest.raises(UserError, match=r"dataset\.list: .*list\.jsonl: cannot be read: maximum recursion depth"):
        open_list_set(file)
    over_many_lines = '{"path": "1.jpg", "label":\n' + "[\n" * 50_000 + "]\n" * 50_000 + "}\n"
    with pytest.raises(UserError, match=r"row 0 is no JSON object on a line of its own"):
        open_list_set(write_csv(tmp_path, over_many_lines, "lines.jsonl"))
    wide = f"[{','.join(['[]'] * 5_000)}]"  # many brackets, but no depth
    with pytest.raises(
        UserError, match=r"dataset\.label_column: 'label' in .*wide\.jsonl holds several labels in row 0"
    ):
        open_list_set(write_csv(tmp_path, rows % wide, "wide.jsonl"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"path_column": "file"},
            r"path_column: 'file' is no column .*; columns: path \(text\), label \(text\), twice \(text\), twice",
        ),
        ({"label_column": "class"}, r"label_column: 'class' is no column of integers or text in"),
        ({"split_column": "part"}, r"split_column: 'part' is no column of text in"),
        ({"label_column": "twice"}, r"label_column: 'twice' is no column"),
    ],
)
def test_missing_column_lists_columns(tmp_path: Path, fields: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.{text}"):
        open_list_set(write_csv(tmp_path, "path,label,twice,twice\na.jpg,0,1,1\n"), **fields)


def test_fractional_labels_raise(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"dataset\.label_column: 'label' in .*x\.jsonl holds numbers that are not whole, e"
    ):
        open_list_set(write_csv(tmp_path, '{"path": "a.jpg", "label": 0.5}\n', "x.jsonl"))

"""Columns are found by their names, also in other case and signs, and by usual names in place of a default."""

from firstlight.pipeline.data.sources.conventions.column_names import (
    LABEL_COLUMNS,
    PATH_COLUMNS,
    FoundColumn,
    find_column,
    plain_name,
)


def test_signs_and_case_are_of_no_account() -> None:
    assert {plain_name(name) for name in ("Image_Path", "#image path", "image-path", "IMAGEPATH")} == {"imagepath"}


def test_exact_name_comes_first() -> None:
    assert find_column("path", ["path", "Path", "file"], "key", PATH_COLUMNS) == FoundColumn("path")


def test_name_that_differs_in_case_is_reported() -> None:
    found = find_column("path", ["PATH", "Label"], "dataset.path_column", PATH_COLUMNS)
    assert found == FoundColumn("PATH", "dataset.path_column: there is no 'path', 'PATH' is taken")
    assert find_column("path", ["Path", "PATH"], "key", PATH_COLUMNS) is None


def test_usual_name_replaces_only_a_default() -> None:
    assert find_column("label", ["Class_Name", "n"], "key", LABEL_COLUMNS) == FoundColumn(
        "Class_Name", "key: there is no 'label', 'Class_Name' is taken"
    )
    assert find_column("label", ["class", "category"], "key", LABEL_COLUMNS) is None
    assert find_column("class", ["label"], "key", LABEL_COLUMNS) is None
    assert find_column("label", ["class", "category"], "key", LABEL_COLUMNS, lambda name: name == "class") is not None
    assert find_column("path", ["path", "path"], "key", PATH_COLUMNS) is None

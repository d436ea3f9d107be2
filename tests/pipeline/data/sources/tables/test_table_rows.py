"""The rules that all formats of rows share."""

import numpy as np
import pyarrow as pa
import pytest

from firstlight.pipeline.data.sources.tables.table_rows import group_by_part, replace_damaged, take_images


def test_rows_are_grouped_by_the_file_that_has_them() -> None:
    found = [(part, rows.tolist()) for part, rows in group_by_part([3, 0, 2], np.array([0, 2, 3, 4]))]
    assert found == [(0, [0, 2]), (2, [0, 1])]


def test_images_of_chosen_rows() -> None:
    values = pa.array([{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": None}, {"bytes": b"c", "path": None}])
    assert list(take_images(values, np.array([0, 1, 2]), "bytes")) == [
        (b"a", " a.png", None),
        (None, "", "the row has no image (null)"),
        (b"c", "", None),
    ]


@pytest.mark.parametrize("good", [0, 2])
def test_damage_costs_the_rows_from_there_on(good: int) -> None:
    def read() -> object:
        for _ in range(good):
            yield b"a", "", None
        raise pa.ArrowInvalid("torn")

    found = list(replace_damaged("x.arrow", 3, read()))  # type: ignore[arg-type]
    assert [data for data, _, _ in found] == [b"a"] * good + [None] * (3 - good)
    assert found[-1][2] == "x.arrow cannot be read: torn"

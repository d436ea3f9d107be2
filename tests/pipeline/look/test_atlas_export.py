"""The file for embedding-atlas: its columns, its neighbours by row, and its pictures."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look import atlas_export
from firstlight.pipeline.look.atlas_export import ATLAS_FILE, write_atlas_table
from tests.support.look_facts import make_look_facts


def test_row_has_what_the_program_reads(tmp_path: Path, digits: Store) -> None:
    facts = make_look_facts(tmp_path, digits)
    file = tmp_path / ATLAS_FILE
    command = write_atlas_table(facts, tmp_path)
    assert command == f"embedding-atlas {file} --x x --y y --neighbors neighbors --image image"
    rows = pq.read_table(file).to_pylist()
    assert [row["id"] for row in rows] == facts.ids.tolist()
    labels = digits.labels()
    assert [row["label"] for row in rows] == [digits.classes[labels[k]] for k in facts.ids]
    assert [row["split"] for row in rows].count("test") == 20
    with Image.open(io.BytesIO(rows[3]["image"]["bytes"])) as picture:
        assert picture.size == (8, 8)
    assert len({(row["x"], row["y"]) for row in rows}) == len(rows)
    assert np.allclose([row["embedding"] for row in rows], facts.features)


def test_neighbours_are_rows_and_copies_are_counted(tmp_path: Path, digits: Store) -> None:
    facts = make_look_facts(tmp_path, digits)
    write_atlas_table(facts, tmp_path)
    rows = pq.read_table(tmp_path / ATLAS_FILE).to_pylist()
    near = rows[0]["neighbors"]
    assert set(near["ids"][:3]) == {0, 1, len(rows) - 1}
    assert np.allclose(near["distances"][:3], 0.0, atol=1e-3)
    assert near["distances"] == sorted(near["distances"])
    assert {len(row["neighbors"]["ids"]) for row in rows} == {9}
    assert [row["near_duplicates"] for row in rows[:3]] == [2, 2, 0]
    assert [row["leak"] for row in (*rows[:3], rows[-1])] == [True, True, False, True]


def test_many_images_are_placed_without_tsne(tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def place(features: np.ndarray, how: str) -> tuple[np.ndarray, tuple[str, str]]:
        asked.append(how)
        return features[:, :2], ("a", "b")

    monkeypatch.setattr(atlas_export, "project_to_plane", place)
    write_atlas_table(make_look_facts(tmp_path, digits), tmp_path)
    monkeypatch.setattr(atlas_export, "MAX_TSNE_IMAGES", 5)
    write_atlas_table(make_look_facts(tmp_path, digits), tmp_path)
    assert asked == ["tsne", "pca"]

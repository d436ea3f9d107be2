"""A saved table is loaded with every bit, or refused in one line that names the file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts.table_folder import SavedTable, load_table, save_table
from firstlight.pipeline.train.folder_manifest import write_file, write_manifest
from tests.support.saved_encoders import DAMAGE


def table(n: int = 6) -> SavedTable:
    return SavedTable(np.arange(n) * 3, torch.rand(n, 4), "ab" * 32)


def test_table_round_trip_keeps_every_bit_and_the_facts(tmp_path: Path) -> None:
    saved = table()
    save_table(saved, tmp_path, {"method": {"name": "super_and"}, "seed": 3})
    found = load_table(tmp_path)
    assert found.ids.tolist() == [0, 3, 6, 9, 12, 15]
    assert torch.equal(found.values, saved.values)
    assert found.store == saved.store
    told = json.loads((tmp_path / "table.json").read_text())
    assert told == {"format": 1, "shape": [6, 4], "method": {"name": "super_and"}, "seed": 3, "store": saved.store}
    assert {path.name for path in tmp_path.iterdir()} == {"table.json", "table.safetensors", "manifest.json"}


@pytest.mark.parametrize("file", ["table.json", "table.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_table_names_the_file(tmp_path: Path, file: str, kind: str) -> None:
    save_table(table(), tmp_path, {})
    DAMAGE[kind](tmp_path / file)
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not a whole table: .*{file}") as told:
        load_table(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("ids", "shape"), [([0, 0, 3], [3, 4]), ([3, 0, 6], [3, 4]), ([0, 3], [3, 4]), ([0, 3, 6], [3, 5])]
)
def test_table_whose_ids_or_shape_are_wrong_is_refused(tmp_path: Path, ids: list[int], shape: list[int]) -> None:
    tensors = {"ids": torch.tensor(ids), "values": torch.zeros(3, 4)}
    files = write_file(tmp_path, "table.safetensors", save(tensors))
    files |= write_file(tmp_path, "table.json", json.dumps({"shape": shape, "store": "x"}).encode())
    write_manifest(tmp_path, files)
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not a whole table: table\."):
        load_table(tmp_path)


def test_table_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    values = torch.rand(6, 4)
    values[2, 1] = torch.nan
    save_table(SavedTable(table().ids, values, "x"), tmp_path, {})
    with pytest.raises(UserError, match=r"is not a whole table: values has numbers that are not finite$"):
        load_table(tmp_path)


def test_folder_of_a_network_is_no_table(folder: Path) -> None:
    with pytest.raises(UserError, match="is not a whole table"):
        load_table(folder)

"""The index on disk, and what it finds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.features.feature_index import (
    IDS_FILE,
    VECTORS_FILE,
    FeatureIndex,
    open_index,
    save_index,
)
from firstlight.pipeline.train.folder_manifest import write_file, write_manifest
from firstlight.tasks.downstream.knn import nearest_neighbours


def features(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, n: int = 40) -> tuple[np.ndarray, Tensor]:
    ids, x = np.arange(n) * 3, features(n)
    rows = pa.table({"id": ids, "path": [f"{i}.png" for i in ids.tolist()], "label": np.zeros(n, np.int64)})
    save_index(folder, FeatureIndex.from_features(ids, x), rows, {"layer": -1})
    return ids, x


def test_saved_index_finds_the_nearest_by_cosine(tmp_path: Path) -> None:
    ids, x = saved(tmp_path)
    asked = features(9, seed=1) * 100
    found, cosines = open_index(tmp_path).search(asked, 7)
    expected, places = nearest_neighbours(asked, x, 7)
    assert found.tolist() == ids[places.numpy()].tolist()
    np.testing.assert_allclose(cosines, expected.numpy(), atol=1e-6)
    assert pq.read_table(tmp_path / IDS_FILE).column_names == ["id", "path", "label"]


def test_equal_images_are_found_in_order_of_ids_and_missing_ones_are_minus_one() -> None:
    index = FeatureIndex.from_features(np.array([5, 7, 9]), torch.ones(3, 2))
    ids, cosines = index.search(torch.ones(1, 2), 5)
    assert ids.tolist() == [[5, 7, 9, -1, -1]]
    assert cosines[0, :3].tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("file", [IDS_FILE, VECTORS_FILE, "manifest.json"])
def test_a_damaged_index_is_named(tmp_path: Path, file: str) -> None:
    saved(tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"is not a whole index: .*" + file) as told:
        open_index(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"IxF2", b"nothing of the kind", b"IxMp" + bytes(100)])
def test_files_that_are_no_index_are_refused(tmp_path: Path, content: bytes) -> None:
    saved(tmp_path)
    files = write_file(tmp_path, IDS_FILE, (tmp_path / IDS_FILE).read_bytes()) | write_file(
        tmp_path, VECTORS_FILE, content
    )
    write_manifest(tmp_path, files, count=40)
    with pytest.raises(UserError, match="is not a whole index"):
        open_index(tmp_path)


def test_faiss_uses_no_more_threads_than_torch() -> None:
    program = (
        "import torch, numpy as np; torch.set_num_threads(1)\n"
        "from firstlight.pipeline.stages.features.feature_index import FeatureIndex, import_faiss\n"
        "x = torch.randn(500, 16); index = FeatureIndex.from_features(np.arange(500), x)\n"
        "found, _ = index.search(x, 1)\n"
        "assert (found[:, 0] == np.arange(500)).all(); y = x @ x.T; assert torch.isfinite(y).all()\n"
        "print(import_faiss().omp_get_max_threads(), torch.get_num_threads())"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert answer.stdout.split() == ["1", "1"], answer.stderr

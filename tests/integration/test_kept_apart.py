"""A recipe that measures nothing trains on all photographs, and a later one on the same store is told."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run.runner import RecipeRun, run_recipe
from firstlight.pipeline.stages.artifacts.encoder_description import read_encoder_spec
from tests.support import recipes

pytestmark = pytest.mark.usefixtures("undrawn_figures")

PRETRAIN: dict[str, Any] = {**recipes.RECIPE["stages"]["pretrain"], "epochs": 1, "batch_size": 16}


def write_photographs(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for k in range(60):
        file = root / ("cat", "dog")[k % 2] / f"{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            continue
        Image.fromarray(rng.integers(0, 100 + 100 * (k % 2), (12, 12, 3), np.uint8)).save(file)
    return root


def run(tmp_path: Path, name: str, stages: dict[str, Any]) -> tuple[RecipeRun, str]:
    changes = {
        "name": name,
        "stages": {key: dict(stage) for key, stage in stages.items()},
        "encoder__mean": None,
        "encoder__std": None,
        "dataset__name": "photos",
        "dataset__source": "folder",
        "dataset__root": str(write_photographs(tmp_path / "photos")),
        **dict.fromkeys(("dataset__max_train", "dataset__max_test", "dataset__test_fraction", "dataset__val_fraction")),
    }
    console = Console(file=io.StringIO(), width=1000)
    found = run_recipe(recipes.recipe(tmp_path / "st", **changes), console)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_all_images_are_trained_on_and_a_recipe_that_measures_is_warned(tmp_path: Path) -> None:
    first, told = run(tmp_path, "alone", {"pretrain": PRETRAIN})
    (pretrained,) = first.instances
    assert pretrained.result is not None
    assert pretrained.result["images"] == 60
    assert "note no stage measures anything on test images or held-out images: such are trained on, too" in told
    (folder,) = (tmp_path / "st" / "stores").iterdir()
    store = Store.open(folder)
    assert store.splits == {"train": 48, "test": 12}
    spec = read_encoder_spec(pretrained.folder / "encoder")
    assert f"encoder.mean: {list(spec['mean'])}, encoder.std: {list(spec['std'])}" in told
    assert 0.1 < spec["mean"][0] < 0.6
    page = (tmp_path / "st" / "alone" / "report.html").read_text()
    assert "read 60 files, left out 0" in page
    assert "no stage measures anything on test images" in page

    evaluate = {"kind": "evaluate", "knn_k": 3, "encoder": f"runs:/{told.split('runs:/')[1].split('/')[0]}/encoder"}
    second, told = run(tmp_path, "later", {"evaluate": evaluate})
    assert [path.name for path in (tmp_path / "st" / "stores").iterdir()] == [folder.name]
    assert "was trained on all images of this store, without labels, also on those that this recipe measures on" in told
    assert "was trained on all images of this store" in (tmp_path / "st" / "later" / "report.html").read_text()
    assert second.rows[0].measure

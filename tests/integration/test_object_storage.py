"""A whole recipe with `storage` in a bucket: what is there afterwards, and machines that start with nothing."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.run import mirroring
from firstlight.pipeline.run.runner import RecipeRun, run_recipe
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.checkpoint import Checkpoints
from tests.support import recipes
from tests.support.object_server import ObjectServer, serve_objects
from tests.support.recipe_runs import runs_of
from tests.support.state_hash import hash_state

pytestmark = pytest.mark.usefixtures("blank_figures")
URI = "s3://bucket/runs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with serve_objects(tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def run(recipe: Recipe) -> tuple[RecipeRun, str]:
    text = io.StringIO()
    return run_recipe(recipe, Console(file=text, width=400)), text.getvalue()


def forget(recipe: Recipe) -> None:
    """Removes the working folder, as on another machine."""
    shutil.rmtree(recipe.storage)


def list_objects(recipe: Recipe) -> list[str]:
    mirror = mirroring.find_mirror(recipe.storage)
    assert mirror is not None
    return mirror.bucket.list_names()


def pretraining(name: str, database: str, **changes: Any) -> Recipe:
    recipe = recipes.recipe(URI, name=name, tracking__uri=database, **changes)  # type: ignore[arg-type]
    del recipe.stages["evaluate"], recipe.stages["finetune"]
    return recipe


def end_state(recipe: Recipe) -> str:
    (folder,) = (recipe.storage / recipe.name).glob("pretrain-seed0-*")
    found, _ = Checkpoints(folder / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards])


def test_a_machine_with_an_empty_cache_finds_all_stages_finished(server: ObjectServer, database: str) -> None:
    recipe = recipes.recipe(URI, tracking__uri=database)  # type: ignore[arg-type]
    first, _ = run(recipe)
    names = list_objects(recipe)
    kinds = ("pretrain-seed0", "evaluate-seed0", "finetune-seed0")
    for kind in kinds:
        (result,) = [n for n in names if n.startswith(f"small/{kind}") and n.count("/") == 2 and "/result" in n]
        folder = result.removesuffix("result.json")
        assert {f"{folder}{file}" for file in ("contents.json", "mlflow.json", "published.json")} <= {*names}
    assert {"small/report.html", "small/contents.json", "small/recipes/contents.json"} <= {*names}
    assert sum(name.startswith("stores/digits-") and name.endswith("/manifest.json") for name in names) == 1
    assert not [name for name in names if Path(name).name.startswith(".") or name.endswith(".tmp")]
    # As on disk, the newest two.
    steps = {Path(name).parts[-2] for name in names if "/checkpoints/" in name and name.startswith("small/pretrain")}
    assert len(steps) == 2
    known = runs_of(recipe).keys()

    forget(recipe)
    again, text = run(recipe)

    assert again.rows == first.rows
    assert text.count("finished before, unchanged") == 3
    assert "nothing was run" in text
    assert again.run_id == first.run_id
    assert runs_of(recipe).keys() == known
    assert list_objects(recipe) == names


def test_killed_training_continues_bit_equal_on_an_empty_machine(
    server: ObjectServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretraining("whole", database)
    run(whole)
    expected = end_state(whole), read_losses(whole)
    recipe = pretraining("killed", database)
    monkeypatch.setenv(failures.FAULT_VARIABLE, "rank=0,step=4,kind=raise")
    with pytest.raises(RuntimeError, match="injected fault"):
        run(recipe)
    monkeypatch.delenv(failures.FAULT_VARIABLE)
    forget(recipe)
    run(recipe)

    (folder,) = (recipe.storage / recipe.name).glob("pretrain-seed0-*")
    notes = [row["note"] for row in map(json.loads, (folder / "metrics.jsonl").open()) if "note" in row]
    assert any(note.startswith("continued from the checkpoint of step 3 ") for note in notes), notes
    assert (end_state(recipe), read_losses(recipe)) == expected


def read_losses(recipe: Recipe) -> list[tuple[int, float]]:
    (folder,) = (recipe.storage / recipe.name).glob("pretrain-seed0-*")
    rows = map(json.loads, (folder / "metrics.jsonl").open())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]

"""A recipe's runs have the same numbers in MLflow, TensorBoard and Weights & Biases."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.tracking.client import TrackingClient
from tests.support import recipes
from tests.support.logger_files import read_tensorboard, read_wandb

pytestmark = pytest.mark.usefixtures("undrawn_figures")


def test_all_runs_of_a_recipe_have_the_same_numbers_in_all_loggers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        monkeypatch.delenv(key)
    console = Console(file=open(tmp_path / "console.txt", "w"))  # noqa: SIM115
    recipe = recipes.recipe(tmp_path, tracking__loggers=["tensorboard", "wandb"])
    run_recipe(recipe, console)
    run_recipe(recipe, console)
    console.file.close()
    assert "has failed" not in (tmp_path / "console.txt").read_text()
    tracking = TrackingClient(recipe)
    runs = tracking.client.search_runs([tracking.experiment_id])
    assert {run.data.tags.get("firstlight.kind") for run in runs} == {
        None,
        "prepare",
        "pretrain",
        "evaluate",
        "finetune",
    }
    for run in runs:
        wanted = {
            key: sorted((m.step, m.value) for m in tracking.client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        assert wanted
        logs = read_wandb(tmp_path, run.info.run_id)
        assert {key: sorted(points) for key, points in logs["numbers"].items()} == wanted
        assert logs["exit"] == 0
        (folder,) = (tmp_path / "tensorboard" / "small").glob(f"*-{run.info.run_id[:8]}")
        board, _ = read_tensorboard(tmp_path, folder)
        assert board["scalars"].keys() == wanted.keys()
        for key, points in wanted.items():
            found = sorted(board["scalars"][key])
            assert [step for step, _ in found] == [step for step, _ in points]
            assert [value for _, value in found] == pytest.approx([value for _, value in points], rel=1e-6)
        figures = {file.path for file in tracking.client.list_artifacts(run.info.run_id, "figures")}
        assert {f"{name}.png" for name in board["images"]} == {f"{name}.png" for name in logs["images"]} == figures

"""Two pretrainings of a recipe are compared with the same fresh weights: these are fine-tuned and scored once.

Every result is as if each stage had done it.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages import evaluate
from firstlight.pipeline.stages.evaluate import EVALUATION_MAP_FILE
from firstlight.pipeline.stages.features.frozen_features import compute_features
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics_rows
from tests.support import recipes
from tests.support.recipe_runs import QUIET

pytestmark = pytest.mark.usefixtures("undrawn_figures")

FIRST = copy.deepcopy(recipes.RECIPE["stages"])
FIRST["evaluate"]["probe_weight_decays"] = [0.001]
SECOND = {f"other_{name}": copy.deepcopy(stage) for name, stage in FIRST.items()}
SECOND["other_pretrain"]["optimizer"]["lr"] = 0.05


def run_stages(storage: Path, stages: dict[str, Any]) -> dict[str, Path]:
    """Runs a recipe of some stages. Returns the folder of each."""
    raw = {**recipes.RECIPE, "stages": stages, "storage": str(storage), "seeds": [3]}
    instances = run_recipe(recipes.parse_recipe(json.loads(json.dumps(raw))), QUIET).instances
    return {instance.stage: instance.folder for instance in instances}


def read_result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def test_fresh_weights_are_done_once_and_results_are_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def compute_counted(context: Any, networks: Any, *arguments: Any) -> Any:
        computed.append(set(networks))
        return compute_features(context, networks, *arguments)

    monkeypatch.setattr(evaluate, "compute_features", compute_counted)
    both = run_stages(tmp_path / "both", {**FIRST, **SECOND})
    assert computed == [{"pretrained", "random"}, {"pretrained"}]
    alone = run_stages(tmp_path / "alone", SECOND)
    assert computed[2] == {"pretrained", "random"}
    for stage in ("other_evaluate", "other_finetune"):
        assert read_result(both[stage]) == read_result(alone[stage])
    maps = [load_file(found["other_evaluate"] / EVALUATION_MAP_FILE) for found in (both, alone)]
    assert (
        maps[0].keys()
        == maps[1].keys()
        == {"ids", *(f"{arm}_{part}" for arm in ("pretrained", "random") for part in ("points", "share"))}
    )
    assert all(torch.equal(maps[0][name], maps[1][name]) for name in maps[0])
    assert not (both["other_finetune"] / "scratch-lr0.1" / "checkpoints").exists()
    for name in ("pretrained-lr0.1", "scratch-lr0.1"):
        curves = [
            [row["loss"] for row in read_metrics_rows(found["other_finetune"] / name / METRICS_FILE) if "loss" in row]
            for found in (both, alone)
        ]
        assert curves[0] == curves[1] != []


def test_work_whose_folder_is_gone_is_done_again(tmp_path: Path) -> None:
    both = run_stages(tmp_path, {**FIRST, **SECOND})
    before = {stage: read_result(both[stage]) for stage in ("other_evaluate", "other_finetune")}
    for stage in ("evaluate", "finetune", "other_evaluate", "other_finetune"):
        shutil.rmtree(both[stage])
    again = run_stages(tmp_path, SECOND)
    for stage, result in before.items():
        assert again[stage] == both[stage]
        assert read_result(again[stage]) == result

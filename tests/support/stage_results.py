"""Stages that have finished with a given result."""

import json
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from tests.support import recipes


def finished(tmp_path: Path, stage: str, seed: int, result: dict[str, Any] | None) -> StageInstance:
    folder = tmp_path / f"{stage}-{seed}"
    folder.mkdir()
    if result is not None:
        (folder / RESULT_FILE).write_text(json.dumps(result))
    return StageInstance(stage, seed, "f", folder)


def evaluated(offset: float) -> dict[str, Any]:
    return {
        arm: {measure: {"val": 0.0, "test": base + offset} for measure, base in scores.items()}
        for arm, scores in {"pretrained": {"knn": 0.5, "probe": 0.6}, "random": {"knn": 0.1, "probe": 0.2}}.items()
    }


OWN = {  # what a paper may have of a pretraining: by which method, and the keys that it needs
    "accuracy": ({"name": "clustering_locality"}, {"labelled_per_batch": 8}),
    "psnr": ({"name": "dae"}, {}),
    "consistency": ({"name": "super_and", "rounds": 2}, {}),
}


def with_own(tmp_path: Path, measure: str, paper: float) -> Recipe:
    method, keys = OWN[measure]
    changes = {f"stages__pretrain__{key}": value for key, value in ({"method": method} | keys).items()}
    return recipes.recipe(
        tmp_path, expected=[{"stage": "pretrain", "measure": measure, "paper": paper, "source": "x"}], **changes
    )

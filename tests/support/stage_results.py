"""Stages that have finished with a given result."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from tests.support import recipes


def finished(tmp_path: Path, stage: str, seed: int, result: dict[str, Any] | None) -> StageInstance:
    folder = tmp_path / f"{stage}-{seed}"
    folder.mkdir(parents=True)
    if result is not None:
        (folder / RESULT_FILE).write_text(json.dumps(result))
    return StageInstance(stage, seed, "f", folder)


def evaluated(offset: float) -> dict[str, Any]:
    return {
        arm: {measure: {"val": 0.0, "test": base + offset} for measure, base in scores.items()}
        for arm, scores in {"pretrained": {"knn": 0.5, "probe": 0.6}, "random": {"knn": 0.1, "probe": 0.2}}.items()
    }


# The scores of each arm by seed, of frozen features and of a fine-tuning. Every gain has a spread.
ARM_SCORES = {
    "pretrained": (0.82, 0.83, 0.84),
    "given": (0.81, 0.82, 0.8),
    "random": (0.41, 0.4, 0.42),
    "scratch": (0.41, 0.4, 0.42),
}


def with_given(storage: Path, **changes: Any) -> Recipe:
    """A recipe of three seeds that names weights, so that its stages compare three arms."""
    return recipes.recipe(storage, seeds=[0, 1, 2], encoder__weights="/weights.safetensors", **changes)


def finish_arms(
    tmp_path: Path, stage: str, scores: Mapping[str, Sequence[float]] = ARM_SCORES, seeds: int = 3
) -> list[StageInstance]:
    """Instances of a stage that have finished with the scores of all arms."""
    found = []
    for seed in range(seeds):
        result: dict[str, Any] = {"labels": 40} if stage == "finetune" else {}
        for arm, by_seed in scores.items():
            score = by_seed[seed]
            tuned = {"lr": 0.1, "val": 0.5, "scores": {"test": {"accuracy": score}}}
            looked = {measure: {"val": 0.5, "test": score} for measure in ("knn", "probe")}
            result[arm] = tuned if stage == "finetune" else looked
        found.append(finished(tmp_path, stage, seed, result))
    return found


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

"""Runs as recipes leave them in MLflow, without the training."""

import json
from pathlib import Path
from typing import Any

from firstlight.pipeline.files import write_json
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.references import find_source_run
from tests.support import recipes

STORE, CODE = "ab" * 32, "cd" * 32


class Past:
    """Writes runs to MLflow, and their folders to `storage`."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.tracking = TrackingClient(recipes.recipe(storage))
        self.client = self.tracking.client

    def recipe(self, name: str, parent: str | None = None, kind: str | None = None) -> str:
        tags = (
            {"firstlight.recipe": name}
            | ({"mlflow.parentRunId": parent} if parent else {})
            | ({"firstlight.kind": kind} if kind else {})
        )
        file = self.storage / name / "recipes" / "0.json"
        run_id = self.tracking.start_run(name, file, {"code": CODE, "store": STORE}, tags)
        self.client.log_dict(run_id, recipes.recipe(self.storage, name=name).dump(), "recipe.json")
        self.tracking.finish_run(run_id)
        return run_id

    def prepare(self, recipe: str, parent: str) -> str:
        facts = {"store": "/somewhere/stores/digits-abc", "hash": STORE, "classes": 10, "source": "digits", "root": ""}
        run_id = self._start(recipe, parent, "prepare", "prepare", 0, facts)
        self.tracking.log_results(run_id, {"images_train": 1438, "images_test": 359, "quarantined": 2})
        self.tracking.finish_run(run_id)
        return run_id

    def pretrain(self, recipe: str, parent: str, seed: int = 0, register_as: str | None = None) -> str:
        run_id = self._start(recipe, parent, "pretrain", f"pretrain seed {seed}", seed, {"seed": seed})
        folder = self._folder(recipe, "pretrain", seed) / "encoder"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"files": {"encoder.safetensors": {"sha256": str(seed)}}}))
        self.tracking.log_encoder(run_id, folder, StageInstance("pretrain", seed, "f", folder), register_as)
        self.tracking.log_results(run_id, {"loss": 0.75, "watch_knn": 0.9, "images_per_s": 100.0 + seed})
        self.tracking.finish_run(run_id)
        return run_id

    def finetune(self, recipe: str, parent: str, seed: int = 0) -> str:
        run_id = self._start(recipe, parent, "finetune", f"finetune seed {seed}", seed, {"seed": seed})
        folder = self._folder(recipe, "finetune", seed) / "model"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
        self.tracking.log_encoder(run_id, folder, StageInstance("finetune", seed, "f", folder), None, "model")
        self.tracking.finish_run(run_id)
        return run_id

    def export(self, recipe: str, parent: str, folder: Path, seed: int = 0) -> str:
        """Logs the files of `folder` as an export."""
        run_id = self._start(recipe, parent, "export", f"export seed {seed}", seed, {"seed": seed})
        self.client.log_artifacts(run_id, str(folder), "export")
        self.tracking.finish_run(run_id)
        return run_id

    def evaluate(self, recipe: str, parent: str, encoder: str, seed: int = 0, seconds: float | None = None) -> str:
        run_id = self._start(recipe, parent, "evaluate", f"evaluate seed {seed}", seed, {"seed": seed})
        self.tracking.log_encoder_source(run_id, encoder, find_source_run(self.tracking, encoder))
        self.tracking.log_results(
            run_id, {"pretrained/knn_test": 0.95 + seed / 100, "random/knn_test": 0.9, "pretrained/knn_val": 0.97}
        )
        self.tracking.log_results(run_id, {} if seconds is None else {"seconds": seconds})
        self.tracking.finish_run(run_id)
        return run_id

    def _folder(self, recipe: str, stage: str, seed: int) -> Path:
        return self.storage / recipe / f"{stage}-seed{seed}-f"

    def _start(self, recipe: str, parent: str, kind: str, name: str, seed: int, params: dict[str, Any]) -> str:
        tags = {"mlflow.parentRunId": parent, "firstlight.kind": kind} | (
            {} if kind == "prepare" else {"firstlight.stage": kind}
        )
        folder = self._folder(recipe, kind, seed)
        run_id = self.tracking.start_run(name, folder / "mlflow.json", params, tags)
        if kind != "prepare":
            from mlflow.entities import Dataset, DatasetInput

            dataset = Dataset("digits-abc", STORE[:36], "local", json.dumps({"sha256": STORE}))
            self.client.log_inputs(run_id, [DatasetInput(dataset)])
        write_json(folder / "published.json", {"run_id": run_id})
        return run_id


def chain(storage: Path) -> tuple[Past, dict[str, str]]:
    """Writes a recipe of two seeds, and another that evaluates the encoder that the first registered."""
    past = Past(storage)
    runs = {"first": past.recipe("first")}
    runs["prepare"] = past.prepare("first", runs["first"])
    for seed in (0, 1):
        runs[f"pretrain{seed}"] = past.pretrain("first", runs["first"], seed, "digits-nat" if seed == 0 else None)
        runs[f"evaluate{seed}"] = past.evaluate(
            "first", runs["first"], f"runs:/{runs[f'pretrain{seed}']}/encoder", seed
        )
    past.tracking.log_stage_runs(runs["first"], "pretrain", [runs["pretrain0"], runs["pretrain1"]])
    runs["second"] = past.recipe("second")
    runs["other"] = past.evaluate("second", runs["second"], "models:/digits-nat/1")
    return past, runs

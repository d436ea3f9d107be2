"""Kills recipes by SIGKILL at random moments: `python -m tests.scripts.chaos [kills] [seed]`.

A whole recipe on the digits (a store, two pretrainings with state per image, an evaluation, a fine-tuning) is run by a
process that is killed at a random moment, and run again, until it ends. Everything it leaves must then be what a run
leaves that was never killed: encoders and results to the last bit, every logged number once, one MLflow run a stage.
The processes are forked from one that has imported everything, so that kills fall into the work and not into start-up.
Prints a line for each recipe that was brought to its end.
"""

import contextlib
import copy
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
import torch
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.stages.stage import RESULT_FILE
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from tests.support import recipes as small

KILLS = 200
OF_THE_CLOCK = (
    "time",
    "images_per_s",
    "images_per_cpu_s",
    "seconds",
    "data_wait",
)  # what the numbers of a metrics file begin with that no two runs share
BEGUN, MODULES = (
    "begun",
    "modules",
)  # files that a process writes: when the recipe starts; what it had imported when it ended


def chaos_recipe(storage: Path) -> Recipe:
    plain = copy.deepcopy(small.RECIPE["stages"])  # `small.recipe` writes into what it is given
    neighbours = {
        **plain["pretrain"],
        "method": {"name": "super_and", "dim": 8, "rounds": 2, "ue_period": 1, "chunk": 40},
    }
    stages = {**plain, "neighbours": neighbours, "look": {"kind": "evaluate", "knn_k": 5, "batch_size": 32}}
    return small.recipe(storage, stages=stages, stages__pretrain__register_as="chaos")


def attempt(storage: Path, seconds: float | None) -> bool:
    """Run the recipe in a process that is killed after `seconds`; whether it had ended before.

    Raises:
        RuntimeError: it failed by itself; with its traceback.
    """
    pid = os.fork()
    if pid == 0:
        _child(storage)
    while not (storage / BEGUN).exists():
        time.sleep(0.001)
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return _ended(storage, status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return _ended(storage, os.waitpid(pid, 0)[1])


def _child(storage: Path) -> None:
    try:
        torch.set_num_threads(1)
        recipe = chaos_recipe(storage)
        (storage / BEGUN).touch()
        run_recipe(recipe, Console(file=io.StringIO()))
        (storage / MODULES).write_text("\n".join(sys.modules))
        os._exit(0)
    except BaseException:
        (storage / "failed").write_text(traceback.format_exc())
        os._exit(1)


def _ended(storage: Path, status: int) -> bool:
    (storage / BEGUN).unlink()
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        raise RuntimeError((storage / "failed").read_text())
    return True


def _import_all(modules: list[str]) -> None:
    """Imports the modules that a run imports on its way, which takes longer than the run."""
    for name in modules:
        with contextlib.suppress(Exception):  # modules that others make up have no file
            importlib.import_module(name)


def left_by(recipe: Recipe) -> dict[str, Any]:
    """Returns what a recipe has left on disk and in MLflow, by name, without the values that depend on the clock."""
    found: dict[str, Any] = {}
    for folder in sorted((recipe.storage / recipe.name).glob("*-seed*")):
        found |= {
            f"{folder.name}/{f.relative_to(folder)}": sha256(f.read_bytes()).hexdigest()
            for f in sorted(folder.rglob("encoder.safetensors"))
        }
        found[f"{folder.name}/{RESULT_FILE}"] = json.loads((folder / RESULT_FILE).read_text("utf-8"))
        for file in sorted(folder.rglob(METRICS_FILE)):
            rows = [{k: v for k, v in row.items() if not k.startswith(OF_THE_CLOCK)} for row in read_metrics(file)]
            found[f"{folder.name}/{file.relative_to(folder)}"] = rows
    found["unfinished files"] = sorted(p.name for p in (recipe.storage / recipe.name).rglob(".*.tmp"))
    return found | _in_mlflow(recipe)


def _in_mlflow(recipe: Recipe) -> dict[str, Any]:
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    assert experiment is not None
    found: dict[str, Any] = {}
    for one in client.search_runs([experiment.experiment_id]):
        name = f"mlflow/{one.info.run_name}"
        assert name not in found, f"{name} stands twice"
        history = sorted({(m.step, m.value) for m in client.get_metric_history(one.info.run_id, "loss")})
        figures = sorted(a.path for a in client.list_artifacts(one.info.run_id, "figures"))
        params = sorted(one.data.params.items()) if "seed" in one.data.params else []
        found[name] = [one.info.status, history, figures, params, len(one.inputs.dataset_inputs)]
    found["mlflow/models"] = [str(model.status) for model in client.search_logged_models([experiment.experiment_id])]
    found["mlflow/versions"] = [(version.name, version.version) for version in client.search_model_versions()]
    return found


def differences(clean: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    return [name for name in sorted(clean.keys() | killed.keys()) if clean.get(name) != killed.get(name)]


def main(kills: int = KILLS, seed: int = 0) -> int:
    """Returns the number of recipes that ended otherwise than the one that was never killed."""
    rng = random.Random(seed)
    code_version()  # once, for all: the source may change under a long run
    with tempfile.TemporaryDirectory() as folder:
        clean, again = Path(folder) / "clean", Path(folder) / "again"
        clean.mkdir()
        attempt(clean, None)
        _import_all((clean / MODULES).read_text().splitlines())
        again.mkdir()
        start = time.monotonic()
        attempt(again, None)
        whole, expected = time.monotonic() - start, left_by(chaos_recipe(clean))
        assert not (differing := differences(expected, left_by(chaos_recipe(again)))), (
            f"two runs that nobody killed differ: {differing}"
        )
        print(f"never killed: {whole:.1f} s, {len(expected)} things to compare", flush=True)
        made, bad, recipes = 0, 0, 0
        while made < kills:
            storage = Path(folder) / f"killed{recipes}"  # never one path twice: MLflow keeps what it opened by its path
            storage.mkdir()
            before = made
            # Moments are drawn from what is left: late in the recipe most would fall behind its end.
            while not attempt(storage, rng.uniform(0.0, whole / 3) if made < kills else None):
                made += 1
            wrong = differences(expected, left_by(chaos_recipe(storage)))
            recipes, bad = recipes + 1, bad + bool(wrong)
            print(
                f"{made:4} kills  recipe {recipes}: ended after {made - before}, "
                f"{'as if never killed' if not wrong else f'DIFFERS: {wrong}'}",
                flush=True,
            )
            shutil.rmtree(storage)
    print(f"{made} kills, {recipes} recipes brought to their end, {bad} of them otherwise than without kills")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(*map(int, sys.argv[1:])), 1))

"""A small recipe on the digits, for tests. It trains in seconds and has a stage of most kinds."""

import json
from pathlib import Path
from typing import Any

# Its import makes the kinds of stages known to recipes.
import firstlight.pipeline.stages.registry  # noqa: F401
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.store import Store

RECIPE: dict[str, Any] = {
    "name": "small",
    "dataset": {
        "name": "digits",
        "source": "digits",
        "image_size": 8,
        "max_train": 120,
        "max_test": 60,
        "test_fraction": 0.2,
        "val_fraction": 0.1,
        "train_augment": [{"op": "random_shift", "padding": 1}],
        "eval_augment": [{"op": "center_crop"}],
    },
    "encoder": {"name": "convnet", "input": "gray", "norm": "sync", "width": 4, "depth": 2},
    # The recipe runs in one process, as tests replace parts of it.
    "scale": {"name": "local", "workers": 0, "gpus_per_worker": 0.0, "processes": 1, "threads": 1},
    "stages": {
        "pretrain": {
            "kind": "pretrain",
            "method": {"name": "nat", "dim": 8, "hidden": [8], "pool": "avg", "norm": "sync", "permutation_period": 2},
            "epochs": 2,
            "batch_size": 32,
            "optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.9},
            "schedule": {"name": "CosineAnnealingLR"},
            "checkpoint_every": 1,
            "log_every": 1,
        },
        "evaluate": {"kind": "evaluate", "knn_k": 5, "batch_size": 32},
        "finetune": {
            "kind": "finetune",
            "task": {"name": "classify"},
            "labels_per_class": 4,
            "epochs": 1,
            "batch_size": 20,
            "optimizer": {"name": "SGD", "lr": 0.1},
            "learning_rates": [0.1, 0.3],
        },
    },
}
# Changes for tests in which the numbers do not matter: one probe, and one training for each arm besides.
ONE_PROBE: dict[str, Any] = {"stages__evaluate__probe_weight_decays": [0.001]}
QUICK: dict[str, Any] = {**ONE_PROBE, "stages__finetune__learning_rates": []}


def recipe(storage: Path, **changes: Any) -> Recipe:
    """Returns the small recipe. `changes` are dotted keys with `__` for the dot: stages__pretrain__epochs=3."""
    raw = json.loads(json.dumps({**RECIPE, "storage": str(storage)}))
    for key, value in changes.items():
        *path, last = key.split("__")
        here = raw
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return parse_recipe(raw)


def store(folder: Path) -> Store:
    """Prepares the digits in this process."""
    return prepare(recipe(folder).dataset, folder / "stores", lambda: False, lambda done, total: None)

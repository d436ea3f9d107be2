"""A small search over the small recipe, and trials that were never run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.pipeline.search.checks import load_checked_plan
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.search.space import Search
from tests.support import recipes

LR, PERIOD = "stages.pretrain.optimizer.lr", "stages.pretrain.method.permutation_period"
SEARCH: dict[str, Any] = {
    "name": "small-search",
    "recipe": "recipe.yaml",
    "space": {LR: {"loguniform": [0.01, 1.0]}, PERIOD: {"choice": [1, 2, 3]}},
    "objectives": [{"measure": "evaluate.knn"}],
    "trials": 4,
}


def write_files(folder: Path, **changes: Any) -> Path:
    """Writes a search file and its recipe; returns the search file.

    `changes`: keys of the search, except `stages`, which has keys of the recipe's stages.
    """
    stages = changes.pop("stages", {})
    recipe = {**recipes.RECIPE, "storage": str(folder / "runs")}
    recipe["stages"] = {name: {**stage, **stages.get(name, {})} for name, stage in recipe["stages"].items()}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "search.yaml").write_text(json.dumps({**SEARCH, **changes}))
    return folder / "search.yaml"


def make_plan(folder: Path, *overrides: str, **changes: Any) -> SearchPlan:
    return load_checked_plan(write_files(folder, **changes), overrides)


def make_search(**changes: Any) -> Search:
    return Search.model_validate_json(json.dumps({**SEARCH, **changes}))


def done_trial(number: int, values: dict[str, Any], *scores: float, seeds: int = 1, **fields: Any) -> Trial:
    """Returns a finished trial. Each of `scores` is that of the first seed; the other seeds score slightly more."""
    by_seed = [[score + 0.01 * k for k in range(seeds)] for score in scores]
    return Trial(number, values, state="done", scores=by_seed, seconds=10.0, ended=1000.0 + 10 * number, **fields)


def make_trials(search: Search, count: int, seeds: int = 1) -> list[Trial]:
    """Returns trials at random points of the space, whose first objective grows with the learning rate.

    Every fifth trial was stopped, every seventh failed.
    """
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        values = {
            key: d.listed_values[rng.integers(len(d.listed_values))]
            if d.listed_values
            else float(rng.uniform(*d.end_values))
            for key, d in search.space.items()
        }
        merit = values.get(LR, 0.5) if isinstance(values.get(LR, 0.5), float) else 0.5
        scores = [0.5 + 0.4 * merit, *(-merit for _ in search.objectives[1:])]
        trial = done_trial(number, values, *scores, seeds=seeds)
        if number % 5 == 4 or number % 7 == 6:
            trial.state, trial.scores = ("stopped" if number % 5 == 4 else "failed"), []
            trial.reason, trial.seen = "behind others at 1 epochs: watch_knn 0.5", [(1.0, 0.5)]
        found.append(trial)
    return found

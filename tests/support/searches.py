"""A small search over the small recipe, for tests; and trials that were never run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.pipeline.search.checks import read
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.space import Plan, Search
from tests.support import recipes

LR, PERIOD = "stages.pretrain.optimizer.lr", "stages.pretrain.method.permutation_period"
SEARCH: dict[str, Any] = {
    "name": "small-search",
    "recipe": "recipe.yaml",
    "space": {LR: {"loguniform": [0.01, 1.0]}, PERIOD: {"choice": [1, 2, 3]}},
    "objectives": [{"measure": "evaluate.knn"}],
    "trials": 4,
}


def files(folder: Path, **changes: Any) -> Path:
    """The search file, its recipe beside it; `changes`: keys of the search, of which those in `stages` are the recipe's."""
    stages = changes.pop("stages", {})
    recipe = {**recipes.RECIPE, "storage": str(folder / "runs")}
    recipe["stages"] = {name: {**stage, **stages.get(name, {})} for name, stage in recipe["stages"].items()}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "search.yaml").write_text(json.dumps({**SEARCH, **changes}))
    return folder / "search.yaml"


def plan(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return read(files(folder, **changes), overrides)


def parsed(**changes: Any) -> Search:
    return Search.model_validate_json(json.dumps({**SEARCH, **changes}))


def done(number: int, values: dict[str, Any], *scores: float, seeds: int = 1, **fields: Any) -> Trial:
    """A trial that has ended, with each score for all seeds, a little apart."""
    by_seed = [[score + 0.01 * k for k in range(seeds)] for score in scores]
    return Trial(number, values, state="done", scores=by_seed, seconds=10.0, ended=1000.0 + 10 * number, **fields)


def many(search: Search, count: int, seeds: int = 1) -> list[Trial]:
    """Trials at random places, whose first objective grows with the learning rate; every fifth was stopped, every seventh failed."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        values = {
            key: d.listed[rng.integers(len(d.listed))] if d.listed else float(rng.uniform(*d.ends))
            for key, d in search.space.items()
        }
        merit = values.get(LR, 0.5) if isinstance(values.get(LR, 0.5), float) else 0.5
        scores = [0.5 + 0.4 * merit, *(-merit for _ in search.objectives[1:])]
        trial = done(number, values, *scores, seeds=seeds)
        if number % 5 == 4 or number % 7 == 6:
            trial.state, trial.scores = ("stopped" if number % 5 == 4 else "failed"), []
            trial.reason, trial.seen = "behind others at 1 epochs: watch_knn 0.5", [(1.0, 0.5)]
        found.append(trial)
    return found

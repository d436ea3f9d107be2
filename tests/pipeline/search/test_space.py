"""The schema of a search file: what it resolves to, and every mistake on one line with its dotted key."""

import json
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.search.plan import load_plan
from firstlight.pipeline.search.space import Asha, Dimension
from tests.support.searches import LR, PERIOD, make_plan, make_search, write_files


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({"choice": [1, [2], None]}, (1, [2], None)),
        ({"uniform": [0.0, 1]}, (0.0, 1.0)),
        ({"randint": [2, 8, 2]}, (2, 8)),
        ({"quniform": [0.0, 1.0, 0.25]}, (0.0, 1.0)),
    ],
)
def test_end_values_are_all_listed_values_or_both_bounds(fields: dict[str, Any], ends: tuple[Any, ...]) -> None:
    assert Dimension.model_validate_json(json.dumps(fields)).end_values == ends


def test_grid_has_as_many_trials_as_points() -> None:
    space = {LR: {"grid": [0.1, 0.2]}, PERIOD: {"choice": [1, 2, 3]}}
    search = make_search(space=space, algorithm="grid", trials=None)
    assert search.num_trials == 6
    assert search.grid_points()[:2] == [{LR: 0.1, PERIOD: 1}, {LR: 0.1, PERIOD: 2}], "the last key varies fastest"


def test_scheduler_can_be_a_name_and_be_overridden(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "overrides": {"stages.pretrain.watch.every": 1},
        "objectives": [{"measure": "pretrain.watch_rankme"}],
    }
    search = make_plan(tmp_path, "scheduler.grace=2", scheduler="asha", **changes).search
    assert search.scheduler == Asha(name="asha", grace=2)
    assert search.scheduler_objective == ("pretrain.watch_rankme", "max")
    assert make_plan(tmp_path, scheduler="none", **changes).search.scheduler_objective is None


PBT: dict[str, Any] = {"name": "pbt", "measure": "pretrain.loss", "mode": "min", "interval": 1}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"spaces": {}}, "spaces: unknown key; did you mean 'space'?"),
    ({"space": {LR: {"loguniform": [0.0, 1.0]}}}, f"space.{LR}: loguniform: [0.0, 1.0] is not valid; valid: 0 < low"),
    ({"space": {LR: {"uniform": [1.0, 0.5]}}}, f"space.{LR}: uniform: [1.0, 0.5] is not valid; valid: low < high"),
    ({"space": {LR: {"uniform": [0.1, 0.5], "choice": [1]}}}, f"space.{LR}: has choice and uniform of choice, grid, "),
    ({"space": {LR: {}}}, f"space.{LR}: has none of choice"),
    ({"space": {LR: {"choice": [0.1, 0.1]}}}, f"space.{LR}: choice: [0.1, 0.1] must not repeat a value"),
    ({"space": {LR: {"normal": [0.1, 0.1]}}}, f"space.{LR}.normal: unknown key; did you mean 'uniform'?"),
    ({"space": {LR: {"grid": [0.1, 0.2]}}}, f"space.{LR}.grid: needs algorithm: grid, but it is optuna"),
    ({"algorithm": "grid"}, f"space.{LR}: a range has no points for algorithm: grid"),
    ({"algorithm": "bayes"}, 'algorithm: "bayes" is not valid'),
    ({"scheduler": "hyperband"}, "scheduler.name: 'hyperband' is unknown; valid: asha, none, pbt"),
    ({"trials": None}, "trials: is missing"),
    ({"trials": 0}, "trials: 0 is not valid"),
    (
        {"space": {PERIOD: {"grid": [1, 2]}}, "algorithm": "grid", "trials": 3},
        "trials: 3 is more than the 2 points of the grid",
    ),
    ({"objectives": []}, "objectives: [] is not valid"),
    ({"objectives": [{"measure": "evaluate.knn", "mode": "most"}]}, 'objectives.0.mode: "most" is not valid'),
    ({"objectives": [{"measure": "evaluate.knn"}] * 2}, "objectives: "),
    ({"promote": {"name": "x", "alias": "a b"}}, 'promote.alias: "a b" is not valid'),
    ({"scheduler": PBT}, "algorithm: 'optuna' learns from trials that have ended"),
    ({"algorithm": "random", "scheduler": PBT, "retrain": True}, "retrain: true is not valid with scheduler: pbt"),
    ({"algorithm": "random", "scheduler": PBT, "trials": 1}, "trials: 1 is no population; valid: 2 or more"),
    (
        {"algorithm": "random", "scheduler": {**PBT, "factors": [1.1, 1.2]}},
        "scheduler.factors: [1.1, 1.2] is not valid",
    ),
    ({"algorithm": "random", "scheduler": {**PBT, "quantile": 0.6}}, "scheduler.quantile: 0.6 is not valid"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistake_is_one_line_with_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_plan(write_files(tmp_path, **changes))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1

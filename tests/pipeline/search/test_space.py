"""A search file: what it resolves to, and every mistake in one line with its dotted key."""

import json
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.search.checks import read
from firstlight.pipeline.search.space import Asha, Dimension
from tests.support import searches
from tests.support.searches import LR, PERIOD, plan


def test_a_trial_runs_what_its_objectives_rest_on_and_leaves_the_test_split_alone(tmp_path: Path) -> None:
    found = plan(tmp_path, stages={"pretrain": {"register_as": "digits"}})
    trial: Any = found.trial({LR: 0.25, PERIOD: 3})
    assert list(trial.stages) == ["pretrain", "evaluate"]
    assert (trial.stages["pretrain"].optimizer.lr, trial.stages["pretrain"].method.permutation_period) == (0.25, 3)
    assert not trial.score_test
    assert trial.stages["pretrain"].register_as is None, "a trial must not take the place of what a run has registered"
    whole: Any = found.whole({LR: 0.25, PERIOD: 3})
    assert list(whole.stages) == ["pretrain", "evaluate", "finetune"]
    assert (whole.score_test, whole.stages["pretrain"].register_as, whole.stages["pretrain"].optimizer.lr) == (
        True,
        "digits",
        0.25,
    )
    assert found.maker(trial) == "pretrain"


def test_the_budget_is_that_of_trials_only_and_the_command_line_is_above_it(tmp_path: Path) -> None:
    found = plan(
        tmp_path,
        "stages.pretrain.batch_size=16",
        "trials=9",
        overrides={"stages.pretrain.epochs": 1, "stages.pretrain.batch_size": 8},
    )
    trial, whole = (make({LR: 0.1, PERIOD: 1}).stages["pretrain"] for make in (found.trial, found.whole))
    assert (trial.epochs, trial.batch_size, found.search.total) == (1, 16, 9)  # type: ignore[union-attr]
    assert (whole.epochs, whole.batch_size) == (2, 16)  # type: ignore[union-attr]


def test_values_are_not_changed_by_what_is_laid_over_them(tmp_path: Path) -> None:
    methods = [
        {"name": "nat", "dim": 8, "hidden": [], "pool": "avg"},
        {"name": "nat", "dim": 4, "hidden": [], "pool": "avg"},
    ]
    found = plan(tmp_path, space={"stages.pretrain.method": {"choice": methods}})
    assert [found.trial(values).stages["pretrain"].method.dim for values in found.corners()] == [8, 4]  # type: ignore[union-attr]
    assert list(found.search.space["stages.pretrain.method"].listed) == methods


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        ({"choice": [1, [2], None]}, (1, [2], None)),
        ({"uniform": [0.0, 1]}, (0.0, 1.0)),
        ({"randint": [2, 8, 2]}, (2, 8)),
        ({"quniform": [0.0, 1.0, 0.25]}, (0.0, 1.0)),
    ],
)
def test_the_ends_of_a_dimension(spec: dict[str, Any], ends: tuple[Any, ...]) -> None:
    assert Dimension.model_validate_json(json.dumps(spec)).ends == ends


def test_a_grid_has_as_many_trials_as_points(tmp_path: Path) -> None:
    space = {LR: {"grid": [0.1, 0.2]}, PERIOD: {"choice": [1, 2, 3]}}
    found = plan(tmp_path, space=space, algorithm="grid", trials=None)
    assert found.search.total == 6
    assert found.search.points()[:2] == [{LR: 0.1, PERIOD: 1}, {LR: 0.1, PERIOD: 2}], "the last key is the fastest"


def test_the_corners_have_every_end(tmp_path: Path) -> None:
    corners = plan(tmp_path).corners()
    assert corners == [{LR: 0.01, PERIOD: 1}, {LR: 1.0, PERIOD: 1}, {LR: 0.01, PERIOD: 2}, {LR: 0.01, PERIOD: 3}]


def test_a_scheduler_by_its_name_and_by_the_command_line(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "overrides": {"stages.pretrain.watch.every": 1},
        "objectives": [{"measure": "pretrain.watch_rankme"}],
    }
    found = plan(tmp_path, "scheduler.grace=2", scheduler="asha", **changes).search
    assert found.scheduler == Asha(name="asha", grace=2)
    assert found.deciding == ("pretrain.watch_rankme", "max")
    assert plan(tmp_path, scheduler="none", **changes).search.deciding is None


def test_the_fingerprint_is_of_what_decides(tmp_path: Path) -> None:
    same = {"trials": 9, "concurrency": 1, "description": "other", "retrain": True, "promote": {"name": "x"}}
    before = plan(tmp_path).fingerprint()
    assert plan(tmp_path, **same).fingerprint() == before
    assert plan(tmp_path, "scale.cpus=4", f"storage={tmp_path / 'other'}").fingerprint() == before
    for change in (
        {"seed": 1},
        {"algorithm": "random"},
        {"objectives": [{"measure": "evaluate.probe"}]},
        {"overrides": {"seeds": [1]}},
    ):
        assert plan(tmp_path, **change).fingerprint() != before, change


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"spaces": {}}, "spaces: unknown key; did you mean 'space'?"),
        ({"space": {LR: {"loguniform": [0.0, 1.0]}}}, f"space.{LR}: loguniform: [0.0, 1.0] is not valid; valid: 0 < low < high"),
        ({"space": {LR: {"uniform": [1.0, 0.5]}}}, f"space.{LR}: uniform: [1.0, 0.5] is not valid; valid: low < high"),
        ({"space": {LR: {"uniform": [0.1, 0.5], "choice": [1]}}}, f"space.{LR}: has choice and uniform of choice, grid, "),
        ({"space": {LR: {}}}, f"space.{LR}: has none of choice"),
        ({"space": {LR: {"choice": [0.1, 0.1]}}}, f"space.{LR}: choice: [0.1, 0.1] must not repeat a value"),
        ({"space": {LR: {"normal": [0.1, 0.1]}}}, f"space.{LR}.normal: unknown key; did you mean 'uniform'?"),
        ({"space": {LR: {"grid": [0.1, 0.2]}}}, f"space.{LR}.grid: needs algorithm: grid, and it is optuna"),
        ({"algorithm": "grid"}, f"space.{LR}: a range has no points for algorithm: grid"),
        ({"algorithm": "bayes"}, 'algorithm: "bayes" is not valid'),
        ({"scheduler": "hyperband"}, "scheduler.name: 'hyperband' is unknown; valid: asha, none, pbt"),
        ({"trials": None}, "trials: is missing"),
        ({"trials": 0}, "trials: 0 is not valid"),
        ({"space": {PERIOD: {"grid": [1, 2]}}, "algorithm": "grid", "trials": 3}, "trials: 3 is more than the 2 points of the grid"),
        ({"objectives": []}, "objectives: [] is not valid"),
        ({"objectives": [{"measure": "evaluate.knn", "mode": "most"}]}, 'objectives.0.mode: "most" is not valid'),
        ({"objectives": [{"measure": "evaluate.knn"}] * 2}, "objectives: "),
        ({"recipe": "nat/tabel3.yaml"}, "recipe: 'nat/tabel3.yaml' is neither below conf/recipe nor beside"),
        ({"space": {"stages.pretrain.optimizer.lrr": {"choice": [1.0]}}}, "space.stages.pretrain.optimizer: lrr is not a parameter of SGD; valid: "),
        ({"space": {"stages.pretrian.epochs": {"choice": [1]}}}, "space.stages.pretrian: no such stage in this recipe; did you mean 'pretrain'?"),
        ({"space": {PERIOD: {"choice": [1, 0]}}}, f"space.{PERIOD}: 0 is not valid"),
        ({"space": {PERIOD: {"choice": [1, "two"]}}}, f'space.{PERIOD}: "two" is not valid'),
        ({"space": {"stages.finetune.epochs": {"choice": [1, 2]}}}, "space.stages.finetune.epochs: changes no objective: a trial runs the stages "),
        ({"space": {"dataset.split_seed": {"choice": [1, 2]}}}, "space.dataset.split_seed: cannot be searched"),
        ({"space": {"seeds": {"choice": [[1], [2]]}}}, "space.seeds: cannot be searched"),
        ({"overrides": {LR: 0.5}}, f"space.{LR}: is searched, and '{LR}' sets it at the same time"),
        ({"overrides": {"stages.pretrain.epoch": 5}}, "stages.pretrain.epoch: unknown key; did you mean 'epochs'?"),
        ({"objectives": [{"measure": "evalute.knn"}]}, "objectives.0.measure: 'evalute.knn': the recipe has no stage 'evalute'"),
        ({"objectives": [{"measure": "evaluate.kNN"}]}, "objectives.0.measure: 'evaluate.kNN' is not measured; did you mean 'evaluate.knn'?"),
        ({"objectives": [{"measure": "evaluate"}]}, "objectives.0.measure: 'evaluate' is not measured; "),
        ({"objectives": [{"measure": "finetune.he"}]}, "objectives.0.measure: 'finetune.he' is not measured; "),
        ({"objectives": [{"measure": "pretrain.watch_knn"}]}, "objectives.0.measure: 'pretrain.watch_knn' is not logged: stages.pretrain.watch"),
        ({"scheduler": "asha"}, "scheduler.measure: 'evaluate.knn' is known only at the end of a trial"),
        ({"scheduler": {"name": "asha", "measure": "pretrain.watch_knn"}}, "scheduler.measure: 'pretrain.watch_knn' is not logged"),
        ({"promote": {"name": "x", "alias": "a b"}}, 'promote.alias: "a b" is not valid'),
        (
            {"objectives": [{"measure": "finetune.scratch"}], "stages": {"finetune": {"arms": ["scratch"]}}, "promote": {"name": "x"},
             "space": {"stages.finetune.epochs": {"choice": [1, 2]}}},
            "promote: no stage of a trial makes the encoder",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(tmp_path, **changes)
    assert str(caught.value).startswith(told)
    assert len(str(caught.value).splitlines()) == 1


def test_a_retrieval_that_reads_test_images_is_no_objective(tmp_path: Path) -> None:
    file = searches.files(tmp_path, objectives=[{"measure": "retrieve.precision@1"}])
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["stages"]["retrieve"] = {"kind": "retrieve"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(
        UserError, match=r"stages\.retrieve\.queries: 'test' reads test images, and score_test is false; valid: val"
    ):
        read(file)
    assert list(read(file, ("stages.retrieve.queries=val",)).trial({LR: 0.1, PERIOD: 1}).stages) == [
        "pretrain",
        "retrieve",
    ]

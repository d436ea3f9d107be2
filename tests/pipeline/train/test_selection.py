"""The choice of weights by a measure, early stopping, and trainings that do both and are stopped on the way."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StopTraining, UserError
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics, read_metrics_rows
from firstlight.pipeline.train.selection import SelectionOptions, WeightSelection, best_folder
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.state_hash import hash_state

OPTIONS = SelectionOptions("watch_knn", True, 2)


def test_best_value_is_kept_and_patience_counts_the_others() -> None:
    selection = WeightSelection(OPTIONS)
    values = [0.3, 0.3, 0.5, math.nan, 0.4]
    better = [selection.record_evaluation(step, {"watch_knn": value}) for step, value in enumerate(values)]
    assert better == [True, False, True, False, False]
    assert (selection.best, selection.best_step, selection.num_since) == (0.5, 2, 2)
    assert selection.is_over
    assert not WeightSelection(SelectionOptions("watch_knn", True, None)).is_over


def test_state_is_restored_also_before_the_first_evaluation() -> None:
    first, second = WeightSelection(OPTIONS), WeightSelection(OPTIONS)
    second.load_state_dict(first.state_dict())
    assert second.best == -math.inf
    first.record_evaluation(3, {"watch_knn": 0.25})
    second.load_state_dict(first.state_dict())
    assert vars(second) == vars(first)


class ScriptedMonitor:
    """Evaluates every two steps; its values are given."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.weights = values, dict[int, str]()
        self.learner: Any = None
        self.step = 0

    def is_due(self, step: int) -> bool:
        self.step = step
        return step % 2 == 0

    def evaluate(self) -> dict[str, float]:
        self.weights[self.step] = hash_state(self.learner.state_dict())
        return {"watch_knn": self.values[self.step // 2]}


def train_selected(folder: Path, store: Store, values: list[float], stop: int | None = None, **keys: Any) -> Any:
    """Trains for six steps. Returns the hash of the weights that are handed on, and those of the evaluations."""

    def stop_training(rank: int, step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    keys = {"keep": "best", "watch": {"every": 1}, "checkpoint_every": 1, **keys}
    changes = {f"stages__pretrain__{key}": value for key, value in keys.items()}
    context = StageContext.create(recipes.recipe(folder, **changes), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))
    learner = pretrain_job.build_seeded_method(context, stage, job)
    monitor = ScriptedMonitor(values)
    monitor.learner = learner
    failures.fault_hook = stop_training
    try:
        fit(job, learner, monitor)
    except KeyboardInterrupt:
        return None
    finally:
        failures.fault_hook = None
    return hash_state(learner.state_dict()), monitor.weights


@pytest.mark.parametrize(("values", "best"), [([0.1, 0.4, 0.3, 0.2], 2), ([0.5, 0.4, 0.3, 0.2], 0), ([0, 1, 2, 3], 6)])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_best_weights_are_handed_on(
    tmp_path: Path, digits: Store, values: list[float], best: int, ema: float | None
) -> None:
    handed_on, weights = train_selected(tmp_path / "whole", digits, values, ema=ema)
    assert handed_on == weights[best]
    assert len({*weights.values()}) == 4
    for stop in (1, 3, 4):
        assert train_selected(tmp_path / str(stop), digits, values, stop, ema=ema) is None
        assert train_selected(tmp_path / str(stop), digits, values, ema=ema)[0] == handed_on, f"stopped at {stop}"


def test_training_ends_early_and_stays_ended(tmp_path: Path, digits: Store) -> None:
    values = [0.1, 0.4, 0.3, 0.9]
    handed_on, weights = train_selected(tmp_path, digits, values, early_stopping=1)
    assert [*weights] == [0, 2, 4]
    assert handed_on == weights[2]
    notes = [row["note"] for row in read_metrics_rows(tmp_path / "job" / METRICS_FILE) if "note" in row]
    assert "ends after step 4 of 6: watch_knn was not better than 0.4 of step 2 in 1 evaluations" in notes
    assert "before the first step: watch_knn 0.1" in notes
    again, seen = train_selected(tmp_path, digits, values, early_stopping=1)
    assert (again, seen) == (handed_on, {})
    last, seen = train_selected(tmp_path / "last", digits, values, early_stopping=1, keep="last")
    assert (last, [*seen]) == (seen[4], [2, 4]), "without keep: best the start is no candidate"
    assert read_metrics(tmp_path / "last" / "job" / METRICS_FILE)[-1]["step"] == 4


def test_lost_best_weights_are_named(tmp_path: Path, digits: Store) -> None:
    train_selected(tmp_path, digits, [0.1, 0.4, 0.3, 0.2])
    (found,) = best_folder(tmp_path / "job").iterdir()
    (found / "manifest.json").unlink()
    with pytest.raises(StopTraining, match=r"best: the best weights, of step 2, are not there; delete"):
        train_selected(tmp_path, digits, [0.1, 0.4, 0.3, 0.2])


def train_on_this_rank(folder: str, store: str) -> str:
    return str(
        train_selected(Path(folder), Store.open(Path(store)), [0.1, 0.4, 0.3, 0.2], early_stopping=1, ema=0.9)[0]
    )


def test_two_workers_choose_the_same_weights(pool: Pool, tmp_path: Path, digits: Store) -> None:
    first, second = pool.run(train_on_this_rank, str(tmp_path), str(digits.path))
    assert first == second


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep": "best"}, "keep: best needs stages.pretrain.watch.every: it is 0"),
        ({"early_stopping": 3}, "early_stopping: 3 needs stages.pretrain.watch.every: it is 0"),
    ],
)
def test_selection_needs_measurements(keys: dict[str, Any], message: str) -> None:
    recipe = {**recipes.RECIPE, "stages": {"pretrain": {**recipes.RECIPE["stages"]["pretrain"], **keys}}}
    with pytest.raises(UserError) as caught:
        parse_recipe(recipe)
    assert message in str(caught.value)


def test_monitor_has_an_effect_only_with_a_selection() -> None:
    def keys_without_effect(**keys: Any) -> frozenset[str]:
        changed = {**recipes.RECIPE["stages"]["pretrain"], "watch": {"every": 1}, **keys}
        return parse_recipe({**recipes.RECIPE, "stages": {"pretrain": changed}}).stages["pretrain"].keys_without_effect

    assert "watch" in keys_without_effect()
    assert "watch" not in keys_without_effect(keep="best")
    assert "watch" not in keys_without_effect(early_stopping=2)
    assert torch.get_num_threads() == 1

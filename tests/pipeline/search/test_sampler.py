"""The settings of the next trial: inside the space, the same after a stop, and better if the sampler learns."""

import json
from typing import Any

import numpy as np
import optuna
import pytest

from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.sampler import build_study, propose_values
from firstlight.pipeline.search.space import Search
from tests.support.searches import LR, PERIOD, done_trial, make_search, make_trials

SPACE: dict[str, Any] = {
    LR: {"loguniform": [0.01, 1.0]},
    PERIOD: {"choice": [1, [2], None]},
    "c": {"randint": [2, 10, 4]},
    "d": {"quniform": [0.0, 1.0, 0.3]},
    "e": {"uniform": [-1.0, 1.0]},
}


def propose_trials(search: Search, count: int, trials: list[Trial] | None = None) -> list[Trial]:
    """Returns trials that were proposed one after the other, and score their learning rate."""
    trials = list(trials or [])
    for number in range(len(trials), count):
        values = propose_values(search, trials, number)
        trials.append(done_trial(number, values, values[LR]))
    return trials


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_settings_are_in_the_space_and_the_same_after_a_stop(algorithm: str) -> None:
    search = make_search(space=SPACE, algorithm=algorithm, trials=20)
    whole = propose_trials(search, 20)
    for trial in whole:
        assert 0.01 <= trial.values[LR] <= 1.0
        assert trial.values[PERIOD] in (1, [2], None)
        assert trial.values["c"] in (2, 6, 10)
        assert trial.values["d"] in (0.0, pytest.approx(0.3), pytest.approx(0.6), pytest.approx(0.9))
        assert -1.0 <= trial.values["e"] <= 1.0
    stopped = json.loads(json.dumps([trial.__dict__ for trial in whole[:11]]))
    assert [t.values for t in propose_trials(search, 20, [Trial(**row) for row in stopped])] == [
        t.values for t in whole
    ]
    assert (
        propose_trials(make_search(space=SPACE, algorithm=algorithm, trials=20, seed=1), 2)[0].values != whole[0].values
    )


def test_random_settings_do_not_depend_on_scores() -> None:
    search = make_search(space=SPACE, algorithm="random", trials=20)
    assert propose_values(search, [done_trial(0, propose_trials(search, 1)[0].values, 0.9)], 1) == propose_values(
        search, [done_trial(0, propose_trials(search, 1)[0].values, 0.1)], 1
    )


def test_optuna_improves_with_trials() -> None:
    search = make_search(space=SPACE, trials=40)
    rates = [trial.values[LR] for trial in propose_trials(search, 40)]
    assert np.median(rates[20:]) > 2 * np.median(rates[:10])


def test_no_setting_is_repeated_while_others_are_left() -> None:
    search = make_search(space={PERIOD: {"choice": [1, 2, 3, 4]}}, algorithm="random", trials=4)
    trials: list[Trial] = []
    for number in range(4):
        trials.append(done_trial(number, propose_values(search, trials, number), 0.5))
    assert {trial.values[PERIOD] for trial in trials} == {1, 2, 3, 4}


def test_grid_is_run_in_its_order() -> None:
    search = make_search(space={LR: {"grid": [0.1, 0.2]}, PERIOD: {"grid": [1, 2]}}, algorithm="grid", trials=None)
    assert [propose_values(search, [], number) for number in range(4)] == search.grid_points()


def test_states_of_trials_become_those_of_optuna() -> None:
    search = make_search()
    trials = [*make_trials(search, 8), Trial(8, {LR: 0.5, PERIOD: 2})]
    states = [trial.state for trial in build_study(search, trials).trials]
    expected = {"done": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "running": "RUNNING"}
    assert [state.name for state in states] == [expected[trial.state] for trial in trials]
    pruned = next(
        trial for trial in build_study(search, trials).trials if trial.state is optuna.trial.TrialState.PRUNED
    )
    assert pruned.intermediate_values == {1000: 0.5}


def test_each_objective_has_its_direction() -> None:
    search = make_search(objectives=[{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}])
    found = build_study(search, [*make_trials(search, 10)])
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert set(propose_values(search, make_trials(search, 10), 10)) == {LR, PERIOD}

"""The settings of the next trial: the same for a search that was stopped, within the space, and better where the sampler learns."""

import json
from typing import Any

import numpy as np
import optuna
import pytest

from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.sampler import propose, study
from firstlight.pipeline.search.space import Search
from tests.support.searches import LR, PERIOD, done, many, parsed

SPACE: dict[str, Any] = {
    LR: {"loguniform": [0.01, 1.0]},
    PERIOD: {"choice": [1, [2], None]},
    "c": {"randint": [2, 10, 4]},
    "d": {"quniform": [0.0, 1.0, 0.3]},
    "e": {"uniform": [-1.0, 1.0]},
}


def drawn(search: Search, count: int, trials: list[Trial] | None = None) -> list[Trial]:
    """Trials one after the other, which score their learning rate."""
    trials = list(trials or [])
    for number in range(len(trials), count):
        values = propose(search, trials, number)
        trials.append(done(number, values, values[LR]))
    return trials


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_within_the_space_and_the_same_after_a_stop(algorithm: str) -> None:
    search = parsed(space=SPACE, algorithm=algorithm, trials=20)
    whole = drawn(search, 20)
    for trial in whole:
        assert 0.01 <= trial.values[LR] <= 1.0
        assert trial.values[PERIOD] in (1, [2], None)
        assert trial.values["c"] in (2, 6, 10)
        assert trial.values["d"] in (0.0, pytest.approx(0.3), pytest.approx(0.6), pytest.approx(0.9))
        assert -1.0 <= trial.values["e"] <= 1.0
    stopped = json.loads(json.dumps([trial.__dict__ for trial in whole[:11]]))
    assert [t.values for t in drawn(search, 20, [Trial(**row) for row in stopped])] == [t.values for t in whole]
    assert drawn(parsed(space=SPACE, algorithm=algorithm, trials=20, seed=1), 2)[0].values != whole[0].values


def test_random_does_not_look_at_what_was_found() -> None:
    search = parsed(space=SPACE, algorithm="random", trials=20)
    assert propose(search, [done(0, drawn(search, 1)[0].values, 0.9)], 1) == propose(
        search, [done(0, drawn(search, 1)[0].values, 0.1)], 1
    )


def test_optuna_learns() -> None:
    search = parsed(space=SPACE, trials=40)
    rates = [trial.values[LR] for trial in drawn(search, 40)]
    assert np.median(rates[20:]) > 2 * np.median(rates[:10])


def test_a_setting_is_not_tried_twice_while_there_are_others() -> None:
    search = parsed(space={PERIOD: {"choice": [1, 2, 3, 4]}}, algorithm="random", trials=4)
    trials: list[Trial] = []
    for number in range(4):
        trials.append(done(number, propose(search, trials, number), 0.5))
    assert {trial.values[PERIOD] for trial in trials} == {1, 2, 3, 4}


def test_a_grid_in_its_order() -> None:
    search = parsed(space={LR: {"grid": [0.1, 0.2]}, PERIOD: {"grid": [1, 2]}}, algorithm="grid", trials=None)
    assert [propose(search, [], number) for number in range(4)] == search.points()


def test_what_the_ledger_knows_as_optuna_sees_it() -> None:
    search = parsed()
    trials = [*many(search, 8), Trial(8, {LR: 0.5, PERIOD: 2})]
    states = [trial.state for trial in study(search, trials).trials]
    expected = {"done": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "running": "RUNNING"}
    assert [state.name for state in states] == [expected[trial.state] for trial in trials]
    pruned = next(trial for trial in study(search, trials).trials if trial.state is optuna.trial.TrialState.PRUNED)
    assert pruned.intermediate_values == {1000: 0.5}


def test_several_objectives_have_directions_of_their_own() -> None:
    search = parsed(objectives=[{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}])
    found = study(search, [*many(search, 10)])
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert set(propose(search, many(search, 10), 10)) == {LR, PERIOD}

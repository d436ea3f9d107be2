"""The settings of the next trial, as a function of (search, number of the trial, what the ledger knows): a search that was killed proposes what it
would have proposed. Optuna's samplers draw; nothing of theirs is kept on disk."""

import json
import logging
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.space import Dimension, Search, Values

optuna.logging.set_verbosity(logging.WARNING)
STATES = {
    "running": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
REDRAWN = 20  # times that a setting is drawn anew where a trial has had it before


def distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.listed:
        return CategoricalDistribution([json.dumps(value) for value in dimension.listed])
    if dimension.randint:
        low, high, step = (*dimension.randint, 1)[:3]
        return IntDistribution(low, high, step=step)
    if dimension.quniform:
        with warnings.catch_warnings():  # a range that is no multiple of its step ends below its high end
            warnings.simplefilter("ignore")
            return FloatDistribution(*dimension.quniform[:2], step=dimension.quniform[2])
    low, high = dimension.bounds
    return FloatDistribution(low, high, log=dimension.loguniform is not None)


def study(search: Search, trials: Sequence[Trial], sampler: BaseSampler | None = None) -> optuna.Study:
    """What the ledger knows, as Optuna sees it. A stopped trial is a pruned one: the sampler learns from how far it came."""
    found = optuna.create_study(
        directions=["maximize" if o.mode == "max" else "minimize" for o in search.objectives], sampler=sampler
    )
    space = {key: distribution(dimension) for key, dimension in search.space.items()}
    turned = -1 if search.deciding and search.deciding[1] != search.objectives[0].mode else 1
    for trial in trials:
        params = {key: json.dumps(value) if search.space[key].listed else value for key, value in trial.values.items()}
        state = STATES[trial.state]
        if state is TrialState.PRUNED and len(search.objectives) > 1:  # Optuna prunes no trial of several objectives
            state = TrialState.FAIL
        steps = (
            {round(epochs * 1000): turned * value for epochs, value in trial.seen} if state is TrialState.PRUNED else {}
        )
        values = trial.means if state is TrialState.COMPLETE else None
        found.add_trial(
            create_trial(state=state, values=values, params=params, distributions=space, intermediate_values=steps)
        )
    return found


def propose(search: Search, trials: Sequence[Trial], number: int) -> Values:
    """The settings of trial `number`, after `trials`: those before it, some of which may still be running."""
    if search.algorithm == "grid":
        return search.points()[number]
    known = trials if search.algorithm == "optuna" else []
    had = {json.dumps(trial.values, sort_keys=True) for trial in trials}
    values: Values = {}
    for attempt in range(REDRAWN):
        seed = int(np.random.SeedSequence((search.seed, number, attempt)).generate_state(1)[0])
        values = _drawn(search, study(search, known, _sampler(search, seed)))
        if json.dumps(values, sort_keys=True) not in had:
            break
    return values


def drawn_anew(search: Search, seed: int) -> Values:
    """Settings at random, with no regard to others."""
    return _drawn(search, study(search, [], RandomSampler(seed=seed)))


def _sampler(search: Search, seed: int) -> BaseSampler:
    if search.algorithm == "random":
        return RandomSampler(seed=seed)
    # Running trials count as poor ones, so that concurrent ones keep apart
    startup = max(4, min(10, search.total // 3))
    return TPESampler(seed=seed, constant_liar=True, n_startup_trials=startup)


def _drawn(search: Search, study_: optuna.Study) -> Values:
    asked = study_.ask({key: distribution(dimension) for key, dimension in search.space.items()})
    return {key: json.loads(value) if search.space[key].listed else value for key, value in asked.params.items()}

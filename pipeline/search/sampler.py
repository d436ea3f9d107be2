"""The settings of the next trial, as a function of the search, the number of the trial and the ledger.

A search that was killed and resumes proposes what it would have proposed. Optuna's samplers draw the settings; nothing
of Optuna is kept on disk.
"""

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
OPTUNA_STATES = {
    "running": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
# The number of times that settings are drawn until they differ from those of all earlier trials.
MAX_DRAWS = 20


def to_distribution(dimension: Dimension) -> BaseDistribution:
    """Returns Optuna's distribution of a dimension. Listed values are its categories, as JSON texts."""
    if dimension.listed_values:
        return CategoricalDistribution([json.dumps(value) for value in dimension.listed_values])
    # Optuna warns if a range is no multiple of its step. The range then ends below its high end, which is meant.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dimension.randint:
            low, high, step = (*dimension.randint, 1)[:3]
            return IntDistribution(low, high, step=step)
        if dimension.quniform:
            return FloatDistribution(*dimension.quniform[:2], step=dimension.quniform[2])
    low, high = dimension.range_bounds
    return FloatDistribution(low, high, log=dimension.loguniform is not None)


def build_study(search: Search, trials: Sequence[Trial], sampler: BaseSampler | None = None) -> optuna.Study:
    """Returns an Optuna study with these trials.

    A stopped trial is a pruned one: the sampler learns from the values that it reported.
    """
    study = optuna.create_study(
        directions=["maximize" if objective.mode == "max" else "minimize" for objective in search.objectives],
        sampler=sampler,
    )
    space = {key: to_distribution(dimension) for key, dimension in search.space.items()}
    # Optuna compares reported values in the direction of the first objective.
    other_mode = search.scheduler_objective and search.scheduler_objective[1] != search.objectives[0].mode
    sign = -1 if other_mode else 1
    for trial in trials:
        state = OPTUNA_STATES[trial.state]
        # Optuna does not prune trials with several objectives.
        if state is TrialState.PRUNED and len(search.objectives) > 1:
            state = TrialState.FAIL
        reported = trial.seen if state is TrialState.PRUNED else []
        study.add_trial(
            create_trial(
                state=state,
                values=trial.means if state is TrialState.COMPLETE else None,
                params={
                    key: json.dumps(value) if search.space[key].listed_values else value
                    for key, value in trial.values.items()
                },
                distributions=space,
                intermediate_values={round(trained * 1000): sign * value for trained, value in reported},
            )
        )
    return study


def propose_values(search: Search, trials: Sequence[Trial], number: int) -> Values:
    """Returns the settings of trial `number`. `trials`: those before it, some of which may still be running."""
    if search.algorithm == "grid":
        return search.grid_points()[number]
    known = trials if search.algorithm == "optuna" else []
    earlier = {json.dumps(trial.values, sort_keys=True) for trial in trials}
    values: Values = {}
    for attempt in range(MAX_DRAWS):
        seed = int(np.random.SeedSequence((search.seed, number, attempt)).generate_state(1)[0])
        values = _ask_study(search, build_study(search, known, _make_sampler(search, seed)))
        if json.dumps(values, sort_keys=True) not in earlier:
            break
    return values


def draw_random_values(search: Search, seed: int) -> Values:
    """Returns random settings, which do not depend on any trial."""
    return _ask_study(search, build_study(search, [], RandomSampler(seed=seed)))


def _make_sampler(search: Search, seed: int) -> BaseSampler:
    if search.algorithm == "random":
        return RandomSampler(seed=seed)
    # `constant_liar`: running trials count as bad ones, so that concurrent trials differ from each other.
    startup = max(4, min(10, search.num_trials // 3))
    return TPESampler(seed=seed, constant_liar=True, n_startup_trials=startup)


def _ask_study(search: Search, study: optuna.Study) -> Values:
    params = study.ask({key: to_distribution(dimension) for key, dimension in search.space.items()}).params
    return {key: json.loads(value) if search.space[key].listed_values else value for key, value in params.items()}

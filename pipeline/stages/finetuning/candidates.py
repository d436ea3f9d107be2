"""The trainings of a fine-tuning, one for each arm and learning rate, and the choice among them."""

import math
from collections.abc import Mapping
from typing import Any

from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.tasks.downstream import TASKS

# The learning rates that are tried by default, as multiples of the optimiser's.
DEFAULT_RATE_FACTORS = (1 / 3, 1.0, 3.0)


def learning_rates_of(stage: Finetune) -> tuple[float, ...]:
    """Returns the learning rates that every arm is trained with.

    The default grid is the same for all arms: with one rate, the arm that it suits better would seem to be better.
    """
    if stage.learning_rates is None:
        return tuple(float(f"{factor * stage.learning_rate:.3g}") for factor in DEFAULT_RATE_FACTORS)
    return stage.learning_rates or (stage.learning_rate,)


def list_candidates(stage: Finetune) -> dict[str, tuple[str, float]]:
    """Returns the arm and the learning rate of each training, by its name."""
    return {f"{arm}-lr{rate:g}": (arm, rate) for arm in stage.compared_arms for rate in learning_rates_of(stage)}


def choose_candidates(stage: Finetune, held_out: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the name of the best training of each arm.

    Args:
        held_out: the scores of each training on held-out images, by its name. The first of equal ones is chosen.
    """
    measure, candidates = TASKS[stage.task.name].measure, list_candidates(stage)
    return {
        arm: max(
            (name for name, (its, _) in candidates.items() if its == arm),
            key=lambda name: _rank_score(held_out[name][measure]),
        )
        for arm in stage.compared_arms
    }


def _rank_score(value: Any) -> float:
    """Returns a score for comparisons; none is the lowest, so that the first rate is chosen where there is no score."""
    return -math.inf if value is None else float(value)

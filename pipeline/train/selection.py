"""The weights that a training hands on: the last, or the best by a measure on held-out images; and early stopping."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The folder of the checkpoint with the best weights, beside that of the newest ones.
BEST_WEIGHTS_FOLDER = "best"


@dataclass(frozen=True)
class SelectionOptions:
    """The measure that the weights of a training are judged by; larger is better.

    `keeps_best`: the weights at the end are the best and not the last. `patience`: the number of evaluations in a row
    without a better one after which the training ends; None: never.
    """

    measure: str
    keeps_best: bool
    patience: int | None

    @property
    def evaluates_start(self) -> bool:
        """True if the weights before the first step are a candidate, too."""
        return self.keeps_best


class WeightSelection:
    """The best evaluation of a training so far. It is part of the training's checkpoints."""

    def __init__(self, options: SelectionOptions) -> None:
        self.options = options
        self.best, self.best_step, self.num_since = -math.inf, 0, 0

    def record_evaluation(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Records an evaluation after `step` steps. Returns True if it is better than all before it.

        A value that is missing or not a number is worse than any.
        """
        value = metrics.get(self.options.measure, math.nan)
        if value > self.best:
            self.best, self.best_step, self.num_since = value, step, 0
            return True
        self.num_since += 1
        return False

    @property
    def is_over(self) -> bool:
        """True if the training ends early."""
        return self.options.patience is not None and self.num_since >= self.options.patience

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON values: -inf, for no evaluation yet, is None."""
        best = None if math.isinf(self.best) else self.best
        return {"best": best, "best_step": self.best_step, "num_since": self.num_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` has returned."""
        self.best = -math.inf if state["best"] is None else float(state["best"])
        self.best_step, self.num_since = int(state["best_step"]), int(state["num_since"])


def best_folder(job_folder: Path) -> Path:
    """Returns the folder of the checkpoint with the best weights of the training in `job_folder`."""
    return job_folder / BEST_WEIGHTS_FOLDER

"""Runs the trials of a search one after the other in this process, without Ray."""

from pathlib import Path
from typing import Any

from firstlight.pipeline.search.trial import run_trial
from firstlight.pipeline.search.tune import TrialSource


def run_in_turn(source: TrialSource, scheduler: Any, num_samples: int, limits: Any, folder: Path) -> None:
    """Takes the place of `tune.run_trials`."""
    while begun := source.begin_trial():
        trial, trial_folder = begun
        run_trial(trial_folder, lambda report: None)
        source.end_trial(trial, "")

"""The state of a search: a JSON file, rewritten atomically whenever a trial begins or ends. A killed search resumes
from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_json
from firstlight.pipeline.search.objectives import Objective
from firstlight.pipeline.stages.code_version import code_version

LEDGER_FILE, OUTCOME_FILE, LEDGER_FORMAT = "ledger.json", "outcome.json", 1

OTHER_CODE_NOTE = (
    "the code has changed since some of the trials were run; their scores may not be what they would be now"
)

State = Literal["running", "done", "stopped", "failed"]


@dataclass
class Segment:
    """The part of a training of a population's trial between two exchanges."""

    # Epochs of the training at the end of the segment.
    epochs: int
    values: dict[str, Any]
    # The number that the scheduler decides by, at the end of the segment.
    value: float
    # The number of the trial whose networks the segment started from, None: the trial's own.
    origin: int | None


@dataclass
class Trial:
    """The settings of a trial, and what is known of it. The fields below `parts` are of populations only."""

    number: int
    # The settings. In a population, those of the segment that is next or running.
    values: dict[str, Any]
    code: str = field(default_factory=code_version)
    state: State = "running"
    # For each objective, one score for each seed. Empty until the trial is done.
    scores: list[list[float]] = field(default_factory=list)
    # What the trial has reported to the scheduler: [epochs, value], in order.
    seen: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    # Seconds since 1970.
    ended: float = 0.0
    # Why it was stopped or failed, on one line.
    reason: str = ""
    # The MLflow run that logged its encoder.
    encoder: str | None = None
    # True if the cause of the failure was outside the trial: the next command resumes it.
    again: bool = False
    # The segments that are trained.
    parts: list[Segment] = field(default_factory=list)
    # The number of the trial whose networks the next or running segment starts from, None: its own.
    origin: int | None = None
    # Epochs at the end of the next or running segment, None: it is the last one.
    until: int | None = None
    # [epochs, settings] of the earlier segments that trained its networks with other settings.
    before: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    # The folder of its training.
    training: str = ""
    # True if its segment is trained and it waits for the other trials.
    resting: bool = False

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def means(self) -> list[float]:
        """The mean over seeds of each objective."""
        return [float(np.mean(scores)) for scores in self.scores]


class SearchState:
    """The trials of a search so far, and the file that they are kept in.

    Raises:
        UserError: the file is no ledger of a search; or the search began with other images than `store` (a sha256), so
            that scores could not be compared.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.file, self.store = folder, folder / LEDGER_FILE, store
        # By stage: the encoders that the recipe names by alias, resolved to versions when the search began.
        self.references: dict[str, str] = {}
        self.trials: list[Trial] = []
        if self.file.exists():
            self._read_file()

    def _read_file(self) -> None:
        try:
            found = json.loads(self.file.read_text("utf-8"))
            self.references = dict(found["references"])
            self.trials = [_parse_trial(row) for row in found["trials"]]
            store = found["store"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file}: is not a ledger of a search ({type(error).__name__}: {error}); delete the folder to "
                "start the search from scratch"
            ) from None
        if store != self.store:
            raise UserError(
                f"dataset: the images are not those that this search began with ({self.folder}); give the search "
                "another name="
            )

    def save(self) -> None:
        rows = [asdict(trial) for trial in self.trials]
        fields = {"format": LEDGER_FORMAT, "store": self.store, "references": self.references, "trials": rows}
        write_json(self.file, fields)

    def trials_in(self, *states: State) -> list[Trial]:
        """Returns the trials in one of these states, in the order of their numbers."""
        return [trial for trial in self.trials if trial.state in states]

    def has_other_code(self) -> bool:
        """Returns True if some trials were run by another version of the code."""
        return any(trial.code != code_version() for trial in self.trials)

    def trial_folder(self, trial: Trial) -> Path:
        return self.folder / "trials" / trial.name

    def load_outcome(self, trial: Trial) -> bool:
        """Loads the file that a trial wrote when it, or its segment, ended. Returns False if the trial wrote none."""
        outcome = self._read_outcome(trial, OUTCOME_FILE)
        pause = None
        if outcome is None and trial.until is not None:
            pause = self._read_outcome(trial, pause_file_name(trial.until))
        found = outcome or pause
        if found is None:
            return False
        found["seconds"] += trial.seconds
        for key, value in found.items():
            setattr(trial, key, value)
        trial.resting = pause is not None
        if pause is not None:
            trial.parts.append(Segment(int(trial.until or 0), dict(trial.values), trial.seen[-1][1], trial.origin))
        return True

    def reopen_trial(self, trial: Trial) -> None:
        """Sets a failed trial back to running, so that it resumes."""
        (self.trial_folder(trial) / OUTCOME_FILE).unlink(missing_ok=True)
        trial.state, trial.reason, trial.again = "running", "", False

    def _read_outcome(self, trial: Trial, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.trial_folder(trial) / name).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return {**found, "seen": [tuple(pair) for pair in found["seen"]]}

    def describe_trials(self) -> list[dict[str, Any]]:
        """Returns a row of JSON values for each trial, as MLflow gets them."""
        return [
            {
                "trial": trial.number,
                "state": trial.state,
                **trial.values,
                "scores": trial.scores,
                "seconds": trial.seconds,
                "reason": trial.reason,
                "parts": list(map(vars, trial.parts)),
            }
            for trial in self.trials
        ]


def find_best_trial(trials: list[Trial], objective: Objective) -> Trial | None:
    """Returns the finished trial with the best mean over seeds of the first objective; the first of equal ones.

    Returns None if no trial has finished.
    """
    done = [trial for trial in trials if trial.state == "done"]
    return max(done, key=lambda trial: objective.sign * trial.means[0]) if done else None


def pause_file_name(until: int | None) -> str:
    """Returns the name of the file that a trial writes at the end of a segment. Its content is that of OUTCOME_FILE."""
    return f"pause-{until}.json"


def _parse_trial(row: dict[str, Any]) -> Trial:
    parts = [Segment(**part) for part in row.get("parts", ())]
    before = [(int(epochs), dict(values)) for epochs, values in row.get("before", ())]
    return Trial(**{**row, "seen": [tuple(pair) for pair in row["seen"]], "parts": parts, "before": before})

"""The state of a search: a JSON file, rewritten atomically whenever a trial begins or ends. A killed search resumes
from it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from firstlight.pipeline.config.stages import LengthUnit
from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.records import (
    Count,
    DamagedRecord,
    FiniteNumber,
    RecordShape,
    read_json_record,
    write_sealed_json,
)
from firstlight.pipeline.search.objectives import Objective, ScoreRange
from firstlight.pipeline.stages.code_version import code_version

LEDGER_FILE, OUTCOME_FILE, LEDGER_FORMAT = "ledger.json", "outcome.json", 1

# The advice about a damaged file of a search, as the end of an error.
LEDGER_ADVICE = "delete the folder to start the search from scratch"
OUTCOME_ADVICE = "delete this file and run again: the trial resumes from its checkpoints"

OTHER_CODE_NOTE = (
    "the code has changed since some of the trials were run; their scores may not be what they would be now"
)

State = Literal["running", "done", "stopped", "failed"]


@dataclass
class Segment:
    """The part of a training of a population's trial between two exchanges."""

    # The length of the training at the end of the segment, in the trial's unit.
    end: int
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
    # The scores for each objective, one for each seed. Empty until the trial is done.
    scores: list[list[float]] = field(default_factory=list)
    # The unit of lengths below: that in which the length of the training is given.
    unit: LengthUnit = "epochs"
    # The reports of the trial to the scheduler: [length, value], in order.
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
    # The length at the end of the next or running segment, None: it is the last one.
    until: int | None = None
    # [length, settings] of the earlier segments that trained its networks with other settings.
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


# [length, value] or [length, settings].
Pair = Annotated[list[Any], Field(min_length=2, max_length=2)]
TrialScores = list[Annotated[list[FiniteNumber], Field(min_length=1)]]


class _SegmentShape(RecordShape):
    """A segment in a ledger."""

    end: Count
    values: dict[str, Any]
    value: float
    origin: Count | None


class _OutcomeShape(RecordShape):
    """The outcome that a trial writes when it, or its segment, ended. A ledger has the same keys for each trial."""

    state: State
    scores: TrialScores = Field([])
    seen: list[Annotated[list[float], Field(min_length=2, max_length=2)]]
    seconds: Annotated[FiniteNumber, Field(ge=0.0)]
    ended: FiniteNumber
    reason: str
    encoder: str | None = None
    again: bool = False
    training: str = ""


class _TrialShape(_OutcomeShape):
    """A trial in a ledger."""

    number: Count
    values: dict[str, Any]
    code: str
    unit: LengthUnit = "epochs"
    parts: list[_SegmentShape] = Field([])
    origin: Count | None = None
    until: Count | None = None
    before: list[Pair] = Field([])
    resting: bool = False


class _LedgerShape(RecordShape):
    """A ledger."""

    store: str
    references: dict[str, str]
    trials: list[_TrialShape]


LEDGER_SHAPE, OUTCOME_SHAPE = TypeAdapter(_LedgerShape), TypeAdapter(_OutcomeShape)


class SearchState:
    """The trials of a search so far, and the file that they are kept in.

    `ranges`: the range of the scores of each objective; () if it is not checked.

    Raises:
        UserError: the file is no ledger of a search, or is damaged; or the search began with other images than `store`
            (a sha256), so that scores could not be compared.
    """

    def __init__(self, folder: Path, store: str, ranges: Sequence[ScoreRange] = ()) -> None:
        self.folder, self.file, self.store, self.ranges = folder, folder / LEDGER_FILE, store, ranges
        # The encoders that the recipe names by alias, resolved to versions when the search began, by stage.
        self.references: dict[str, str] = {}
        self.trials: list[Trial] = []
        if self.file.exists():
            self._read_file()

    def _read_file(self) -> None:
        found = read_json_record(self.file, LEDGER_SHAPE, LEDGER_ADVICE)
        assert found is not None
        try:
            trials = [_parse_trial(row) for row in found["trials"]]
        except (ValueError, TypeError) as error:
            raise DamagedRecord(f"{self.file}: is damaged: {one_line(error)}; {LEDGER_ADVICE}") from None
        for trial in trials:
            self._check_trial(trial, f"{self.file}: is damaged: trial {trial.number}", LEDGER_ADVICE)
        self.references, self.trials = found["references"], trials
        if found["store"] != self.store:
            raise UserError(
                f"dataset: the images are not those that this search began with ({self.folder}); give the search "
                "another name="
            )

    def save(self) -> None:
        rows = [asdict(trial) for trial in self.trials]
        fields = {"format": LEDGER_FORMAT, "store": self.store, "references": self.references, "trials": rows}
        write_sealed_json(self.file, fields)

    def _check_trial(self, trial: Trial, where: str, advice: str) -> None:
        """Checks the scores of a trial against the objectives, and that its training is one of this search."""
        if trial.state == "done" and len(trial.scores) != (len(self.ranges) or len(trial.scores) or 1):
            raise DamagedRecord(f"{where} has scores for {len(trial.scores)} objectives; {advice}")
        for scores, (low, high) in zip(trial.scores, self.ranges, strict=False):
            if wrong := [score for score in scores if not low <= score <= high]:
                raise DamagedRecord(f"{where} has the score {wrong[0]:g}; valid: {low:g} to {high:g}; {advice}")
        if trial.training and not Path(trial.training).is_relative_to(self.folder):
            raise DamagedRecord(f"{where} has its training in {trial.training}, outside of {self.folder}; {advice}")

    def trials_in(self, *states: State) -> list[Trial]:
        """Returns the trials in one of these states, in the order of their numbers."""
        return [trial for trial in self.trials if trial.state in states]

    def has_other_code(self) -> bool:
        """Returns True if some trials were run by another version of the code."""
        return any(trial.code != code_version() for trial in self.trials)

    def trial_folder(self, trial: Trial) -> Path:
        return self.folder / "trials" / trial.name

    def load_outcome(self, trial: Trial) -> bool:
        """Loads the file that a trial wrote when it, or its segment, ended. Returns False if the trial wrote none.

        Raises:
            DamagedRecord: the file is not what the trial has written; names it.
        """
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
        name = OUTCOME_FILE if pause is None else pause_file_name(trial.until)
        self._check_trial(trial, f"{self.trial_folder(trial) / name}: is damaged: the trial", OUTCOME_ADVICE)
        trial.resting = pause is not None
        if pause is not None:
            trial.parts.append(Segment(int(trial.until or 0), dict(trial.values), trial.seen[-1][1], trial.origin))
        return True

    def reopen_trial(self, trial: Trial) -> None:
        """Sets a failed trial back to running, so that it resumes."""
        (self.trial_folder(trial) / OUTCOME_FILE).unlink(missing_ok=True)
        trial.state, trial.reason, trial.again = "running", "", False

    def _read_outcome(self, trial: Trial, name: str) -> dict[str, Any] | None:
        found = read_json_record(self.trial_folder(trial) / name, OUTCOME_SHAPE, OUTCOME_ADVICE)
        if found is None:
            return None
        known = {key: value for key, value in found.items() if key in Trial.__dataclass_fields__}
        return {**known, "seen": [tuple(pair) for pair in found["seen"]]}

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
    before = [(int(end), dict(values)) for end, values in row.get("before", ())]
    return Trial(**{**row, "seen": [tuple(pair) for pair in row["seen"]], "parts": parts, "before": before})

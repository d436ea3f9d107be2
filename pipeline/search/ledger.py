"""What a search has done: a JSON file that is rewritten, whole or not at all, whenever a trial begins or ends. A killed search goes on from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_json
from firstlight.pipeline.stages.stage import code_version

LEDGER, OUTCOME, FORMAT = "ledger.json", "outcome.json", 1

State = Literal["running", "done", "stopped", "failed"]


@dataclass
class Part:
    """What a trial of a population trained between two exchanges: up to `epochs`, with `values`, to `value` of what the scheduler decides by; from
    the networks of trial `origin`, None: its own."""

    epochs: int
    values: dict[str, Any]
    value: float
    origin: int | None


@dataclass
class Trial:
    """`scores`: of a trial that is done, for each objective a value a seed. `seen`: what the scheduler was told: [epochs, value], in order.

    Of a population: `parts` that are trained; of the one that is next or running, `values`, `origin`, and where it ends (`until`, None: at the end);
    `before`: [epochs, settings] of what made its networks so far, where those were other settings; `training`: the folder of its training;
    `resting`: its part is trained, and the others' are waited for.
    """

    number: int
    values: dict[str, Any]
    code: str = field(default_factory=code_version)
    state: State = "running"
    scores: list[list[float]] = field(default_factory=list)
    seen: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    ended: float = 0.0  # seconds since 1970
    reason: str = ""  # why it was stopped or failed, in one line
    encoder: str | None = None  # the MLflow run that logged it
    again: bool = False  # it failed by what was around it: the next command goes on with it
    parts: list[Part] = field(default_factory=list)
    origin: int | None = None
    until: int | None = None
    before: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    training: str = ""
    resting: bool = False

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def means(self) -> list[float]:
        """Of each objective, over seeds."""
        return [float(np.mean(scores)) for scores in self.scores]


class Ledger:
    """The trials of a search so far.

    Raises:
        UserError: the file is not a ledger; or it is of other images than `store` (a sha256), which the trials would be compared across.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.file, self.store = folder, folder / LEDGER, store
        self.references: dict[
            str, str
        ] = {}  # of encoders that the recipe names by alias, pinned when the search began, by stage
        self.trials: list[Trial] = []
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.file.read_text("utf-8"))
            self.references = dict(found["references"])
            self.trials = [_trial(row) for row in found["trials"]]
            store = found["store"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file}: is not a ledger of a search ({type(error).__name__}: {error}); delete the folder to search anew"
            ) from None
        if store != self.store:
            raise UserError(
                f"dataset: is not of the images that this search began with ({self.folder}); give the search another name="
            )

    def save(self) -> None:
        rows = [asdict(trial) for trial in self.trials]
        write_json(self.file, {"format": FORMAT, "store": self.store, "references": self.references, "trials": rows})

    def of_state(self, *states: State) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]

    def place(self, trial: Trial) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / trial.name

    def absorb(self, trial: Trial) -> bool:
        """Take over what a trial has left in its folder, if it came to an end, or to that of its part; whether it did."""
        outcome = self._left(trial, OUTCOME)
        pause = self._left(trial, pause_file(trial.until)) if outcome is None and trial.until is not None else None
        found = outcome or pause
        if found is None:
            return False
        found["seconds"] += trial.seconds
        for key, value in found.items():
            setattr(trial, key, value)
        trial.resting = pause is not None
        if pause is not None:
            trial.parts.append(Part(int(trial.until or 0), dict(trial.values), trial.seen[-1][1], trial.origin))
        return True

    def reopen(self, trial: Trial) -> None:
        """Let a trial that has failed go on."""
        (self.place(trial) / OUTCOME).unlink(missing_ok=True)
        trial.state, trial.reason, trial.again = "running", "", False

    def _left(self, trial: Trial, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.place(trial) / name).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return {**found, "seen": [tuple(pair) for pair in found["seen"]]}


def pause_file(until: int | None) -> str:
    """In the folder of a trial: how it came to the end of its part, as OUTCOME."""
    return f"pause-{until}.json"


def _trial(row: dict[str, Any]) -> Trial:
    parts = [Part(**part) for part in row.get("parts", ())]
    before = [(int(epochs), dict(values)) for epochs, values in row.get("before", ())]
    return Trial(**{**row, "seen": [tuple(pair) for pair in row["seen"]], "parts": parts, "before": before})

"""What a search has done: a JSON file that is rewritten, whole or not at all, whenever a trial begins or ends. A killed search goes on from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.durable import write_json
from pipeline.errors import UserError
from pipeline.stage import code_version

LEDGER, OUTCOME, FORMAT = "ledger.json", "outcome.json", 1

State = Literal["running", "done", "stopped", "failed"]


@dataclass
class Trial:
    """`scores`: of a trial that is done, for each objective a value a seed. `seen`: what the scheduler was told: [epochs, value], in order."""

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
        self.references: dict[str, str] = {}  # of encoders that the recipe names by alias, pinned when the search began, by stage
        self.trials: list[Trial] = []
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.file.read_text("utf-8"))
            self.references = dict(found["references"])
            self.trials = [Trial(**{**row, "seen": [tuple(pair) for pair in row["seen"]]}) for row in found["trials"]]
            store = found["store"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file}: is not a ledger of a search ({type(error).__name__}: {error}); delete the folder to search anew") from None
        if store != self.store:
            raise UserError(f"dataset: is not of the images that this search began with ({self.folder}); give the search another name=")

    def save(self) -> None:
        rows = [asdict(trial) for trial in self.trials]
        write_json(self.file, {"format": FORMAT, "store": self.store, "references": self.references, "trials": rows})

    def of_state(self, *states: State) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]

    def place(self, trial: Trial) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / trial.name

    def absorb(self, trial: Trial) -> bool:
        """Take over what a trial has left in its folder, if it came to an end; whether it did."""
        try:
            outcome = json.loads((self.place(trial) / OUTCOME).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        for key, value in outcome.items():
            setattr(trial, key, value)
        return True

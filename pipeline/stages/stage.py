"""What the stages share: an instance is one stage with one seed; its folder is found again by the fingerprint of all that decides its result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class TrainingSegment:
    """A part of a training that is made in parts, with settings that differ between them.

    `before`: of the parts before it that had other settings, in order: [epochs at its end, by dotted key its settings]. `begin`: the folder of
    the training that it goes on from (`checkpoints/`, and what was logged), None: its own, or none. `until`: epochs after which it pauses, None: it
    goes to its end.
    """

    stage: str
    before: tuple[tuple[int, dict[str, Any]], ...] = ()
    begin: Path | None = None
    until: int | None = None


@dataclass(frozen=True)
class StageInstance:
    """One stage with one seed. `encoder`: the folder of the encoder it starts from, None for pretraining; `beside`: of the head it looks
    through, or the decoder it goes on from. `begin`, `until`: as of a `Passage`."""

    stage: str
    seed: int
    fingerprint: str
    folder: Path
    encoder: Path | None = None
    companion: Path | None = None
    begin: Path | None = None
    until: int | None = None

    @property
    def label(self) -> str:
        return f"{self.stage} seed {self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What the stage found, None until it has finished."""
        try:
            return dict(json.loads((self.folder / RESULT_FILE).read_text("utf-8")))
        except (OSError, ValueError):
            return None

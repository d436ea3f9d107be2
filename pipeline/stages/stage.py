"""An instance is one stage with one seed. Its folder is named by a hash of all that decides its result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class TrainingSegment:
    """A part of a training that is done in parts, with settings that differ between them.

    `before` lists the earlier parts with other settings, each as [epochs at its end, settings by dotted key]. `begin`
    is the folder of the training that this one continues (its checkpoints and logged numbers), None to continue its
    own. `until` is the number of epochs after which it pauses, None to train to the end.
    """

    stage: str
    before: tuple[tuple[int, dict[str, Any]], ...] = ()
    begin: Path | None = None
    until: int | None = None


@dataclass(frozen=True)
class StageInstance:
    """One stage with one seed.

    `encoder` is the folder of the encoder it starts from, None if it starts from none. `companion` is the folder of the
    head or decoder that it needs besides. `begin` and `until` are those of its `TrainingSegment`.
    """

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
        """The content of `result.json`; None until the stage has finished."""
        try:
            return dict(json.loads((self.folder / RESULT_FILE).read_text("utf-8")))
        except (OSError, ValueError):
            return None

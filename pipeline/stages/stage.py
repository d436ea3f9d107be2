"""An instance is one stage with one seed. Its folder is named by a hash of all that decides its result."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from firstlight.pipeline.records import read_json_record, write_sealed_json

RESULT_FILE = "result.json"
RESULT_ADVICE = "delete this file and run again: the stage is finished from its files"
# The content of a result is known to the kind of its stage.
ANY_RESULT = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class TrainingSegment:
    """A part of a training that is done in parts, with settings that differ between them.

    `before` lists the earlier parts with other settings, each as [length at its end, settings by dotted key]. `begin`
    is the folder of the training that this one continues (its checkpoints and logged numbers), None to continue its
    own. `until` is the length after which it pauses, None to train to the end. Lengths are in the unit of the
    training's own length, epochs or steps.
    """

    stage: str
    before: tuple[tuple[int, dict[str, Any]], ...] = ()
    begin: Path | None = None
    until: int | None = None


@dataclass(frozen=True)
class StageInstance:
    """One stage with one seed.

    `encoder` is the folder of the encoder it starts from, None if it starts from none. `given` is that of the weights
    that the recipe names, if the stage compares others with them. `companions` are the folders of
    what it needs besides, by name: a head, a decoder, a memory bank. `begin` and `until` are those of its
    `TrainingSegment`. `facts` is all that decides its result, of which `fingerprint` is the hash; {} where nothing of
    it is shared with other instances.
    """

    stage: str
    seed: int
    fingerprint: str
    folder: Path
    encoder: Path | None = None
    companions: Mapping[str, Path] = field(default_factory=dict)
    begin: Path | None = None
    until: int | None = None
    given: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.stage} seed {self.seed}"

    @property
    def result_file(self) -> Path:
        return self.folder / RESULT_FILE

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of `result.json`; None until the stage has finished.

        Raises:
            DamagedRecord: it is not what the stage has written; names the file.
        """
        try:
            found = os.stat(self.result_file)
        except OSError:
            return None
        return dict(_read_result(self.result_file, found.st_mtime_ns, found.st_size))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes `result.json`, which finishes the stage."""
        write_sealed_json(self.result_file, result)


@lru_cache(maxsize=64)
def _read_result(file: Path, changed_ns: int, size: int) -> dict[str, Any]:
    """Reads a result once, as long as its file stays the same: it is asked for often and may be large."""
    return read_json_record(file, ANY_RESULT, RESULT_ADVICE) or {}

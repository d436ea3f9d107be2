"""What the stages share: an instance is one stage with one seed; its folder is found again by the fingerprint of all that decides its result."""

import json
import subprocess
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from firstlight.pipeline import ROOT

RESULT = "result.json"


@dataclass(frozen=True)
class Passage:
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
class Instance:
    """One stage with one seed. `encoder`: the folder of the encoder it starts from, None for pretraining; `beside`: of the head it looks
    through, or the decoder it goes on from. `begin`, `until`: as of a `Passage`."""

    stage: str
    seed: int
    fingerprint: str
    folder: Path
    encoder: Path | None = None
    beside: Path | None = None
    begin: Path | None = None
    until: int | None = None

    @property
    def label(self) -> str:
        return f"{self.stage} seed {self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What the stage found, None until it has finished."""
        try:
            return dict(json.loads((self.folder / RESULT).read_text("utf-8")))
        except (OSError, ValueError):
            return None


@cache
def git_commit() -> dict[str, str]:
    """MLflow's tag of the commit that the code lies in; {} where it lies in none, or is not as that commit has it."""
    root = (ROOT / "pipeline").resolve().parent
    try:
        changed, commit = (
            _git(root, *words)
            for words in (("status", "--porcelain", "--", "pipeline", "tasks"), ("rev-parse", "HEAD"))
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {} if changed else {"mlflow.source.git.commit": commit}


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


@cache
def code_version() -> str:
    """sha256 over the source of `pipeline` and `tasks`: other code, other result."""
    root = (ROOT / "pipeline").resolve().parent
    content = sha256()
    for folder in ("pipeline", "tasks"):
        for file in sorted((root / folder).rglob("*.py")):
            content.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return content.hexdigest()

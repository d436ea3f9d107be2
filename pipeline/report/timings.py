"""Where the time of the stages went, read from the files that their workers have left."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.attempts import read_attempts
from firstlight.pipeline.train.metrics import METRICS_FILE, SPENT_KEY, TIME_PREFIX, read_rows

# In the order in which they are shown. looks: features of held-out images on the way; evaluation: stages that train nothing; other: all that is none
# of these, such as starting, reading images for the first time, and scoring what was trained
PARTS = (
    "data",
    "forward",
    "backward",
    "tables",
    "assignment",
    "communication",
    "optimizer",
    "checkpoint",
    "looks",
    "evaluation",
    "other",
)
LEAST = 0.002  # a smaller share is not shown


@dataclass(frozen=True)
class Timing:
    """Seconds of a stage and seed, and of its parts."""

    label: str
    seconds: float
    parts: dict[str, float]


def timings(instances: Sequence[StageInstance], batch_sizes: dict[str, int]) -> list[Timing]:
    """Of all that were begun. `batch_sizes`: of the stages that train."""
    out = []
    for instance in instances:
        work = read_attempts(instance.folder)
        if work is None:
            continue
        trained = Counter[str]()
        if instance.stage in batch_sizes:
            for file in sorted(instance.folder.rglob(METRICS_FILE)):
                trained.update(spent(file, batch_sizes[instance.stage]))
        total = max(work.seconds, sum(trained.values()))
        rest = "other" if instance.stage in batch_sizes else "evaluation"
        out.append(Timing(instance.label, total, {**trained, rest: total - sum(trained.values())}))
    return out


def spent(file: Path, batch_size: int) -> dict[str, float]:
    """Seconds by part of a training, from its metrics file."""
    seconds, before = Counter[str](), 0
    for row in read_rows(file):
        if "loss" in row:
            elapsed = (row["step"] - before) * batch_size / max(row["images_per_s"], 1e-9)
            before = row["step"]
            seconds.update(
                {name.removeprefix(TIME_PREFIX): share * elapsed for name, share in row.items() if name.startswith(TIME_PREFIX)}
            )
        seconds.update(row.get(SPENT_KEY, {}))
    return dict(seconds)


def shares(timing: Timing) -> list[tuple[str, float]]:
    """The parts in their order, without those that are too small to be seen. A GPU works while its process waits: there they may add up to more than
    the whole, and are shown as shares of their sum."""
    whole = max(timing.seconds, sum(timing.parts.values()), 1e-9)
    return [(name, timing.parts[name] / whole) for name in PARTS if timing.parts.get(name, 0.0) / whole > LEAST]


def notes(instances: Sequence[StageInstance]) -> list[str]:
    """What was told while the stages ran, each line once."""
    found: dict[str, None] = {}
    for instance in instances:
        for file in sorted(instance.folder.rglob(METRICS_FILE)):
            rows: list[dict[str, Any]] = read_rows(file)
            label = instance.label if file.parent == instance.folder else f"{instance.label} {file.parent.name}"
            found |= {f"{label}: {row['note']}": None for row in rows if "note" in row}
    return list(found)
